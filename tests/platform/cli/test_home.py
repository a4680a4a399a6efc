"""A KVLAB_HOME that cannot be used is said in one line, whichever command meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvlab.platform.cli.main import main

YAML = """
version: 1
name: w
model: {preset: nano}
data: {source: {text: words.txt}, tokenizer: {bytes: true}, sequence_length: 16}
jobs:
  base: {train: {method: full_attention, tokens: 1k}}
"""


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/proc/kv", ("run", "w.yaml")),
        ("file", ("run", "w.yaml")),
        ("file", ("plan", "w.yaml")),
        ("file", ("status",)),
        ("file", ("compare",)),
        ("file/below", ("status", "w")),
    ],
)
def test_one_line(
    place: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.yaml").write_text(YAML)
    Path("words.txt").write_text("some words\n" * 100)
    Path("file").write_text("")
    monkeypatch.setenv("KVLAB_HOME", place)
    monkeypatch.setattr(sys, "argv", ["kvlab", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"KVLAB_HOME {Path(place).absolute()} cannot be written (")
    assert len(said.err.splitlines()) == 1
