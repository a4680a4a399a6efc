"""Every kind of bad input ends in the one line that is written here, and in exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvlab.platform.cli.main import main

KVLAB = [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()"]
EDITS = {
    name: edits
    for file in sorted(Path(__file__).parent.glob("bad_*.yaml"))
    for name, edits in yaml.safe_load(file.read_text()).items()
}

# Whole texts, and the one line that is said about them.
TEXTS = {
    "empty": ("", "1: is empty"),
    "a list": ("- 1\n", "1: must be a mapping, found a list"),
    "broken": ("version: [1\n", "2: is not valid YAML: did not find expected ',' or ']'"),
    "tab": (
        "version: 1\njobs:\n  a:\n\ttrain: {}\n",
        "4: line 4 is indented with a tab: use spaces",
    ),
    "tag": (
        "version: !!python/object/apply:os.system [true]\n",
        "1: must not use tags, found tag:yaml.org,2002:python/object/apply:os.system",
    ),
    "anchor": ("a: &bomb [x, x]\nb: [*bomb, *bomb]\n", "1: must not use anchors, found &bomb"),
    "alias": ("a: 1\nb: *a\n", "2: must not use aliases, found *a"),
    "merge key": ("a: {<<: {b: 1}}\n", "1: must not use merge keys (<<)"),
    "duplicate key": ("name: a\nname: b\n", "2: name: is written twice, first on line 1"),
    "two documents": ("a: 1\n---\nb: 2\n", "2: must hold one YAML document, found a second"),
    "NUL": ("name: a\nversion: \0\n", "2: must not hold NUL characters"),
    "control character": ("a: \x01\n", "1: is not valid YAML: control characters are not allowed"),
    "deep": ("[" * 5000, "1: must not nest deeper than 32 levels"),
    "keys that are no text": ("? [1]\n: 2\n", "1: must have text as keys, found a list or mapping"),
}

CONTENTS = {
    "not UTF-8": (b"version: 1\nname: caf\xe9\n", "2: must be UTF-8, found byte 0xe9 at offset 20"),
    "UTF-16": ("version: 1".encode("utf-16"), "1: must be UTF-8, found byte 0xff at offset 0"),
    "5 MB": (
        b"# " + b"x" * 5_000_000,
        "1: is larger than 1048576 bytes, the most a workflow may be",
    ),
    "binary": (bytes(range(256)), "2: must be UTF-8, found byte 0x80 at offset 128"),
}


def refused(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run `kvlab validate` in this process; return what it says on stderr, without the file."""
    before = sorted(path.parent.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["kvlab", "validate", str(path)])
    monkeypatch.setenv("KVLAB_HOME", str(path.parent / "home"))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert sorted(path.parent.rglob("*")) == before
    lines = said.err.splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return "\n".join(line.removeprefix(f"{path}:") for line in lines)


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_a_good_workflow(
    name: str,
    good: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    edits, expected = EDITS[name]["edits"], EDITS[name]["says"]
    for old, new in edits:
        assert old in good
        good = good.replace(old, new, 1)
    path = tmp_path / "workflow.yaml"
    path.write_text(good)
    said = refused(path, capsys, monkeypatch).splitlines()
    assert len(said) == len(expected), said
    for line, start in zip(said, expected, strict=True):
        assert line == start or (start.endswith(" ") and line.startswith(start))


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_workflow(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, expected = TEXTS[name]
    path = tmp_path / "workflow.yaml"
    path.write_text(text)
    assert refused(path, capsys, monkeypatch) == expected


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_are_no_text(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content, expected = CONTENTS[name]
    path = tmp_path / "workflow.yaml"
    path.write_bytes(content)
    assert refused(path, capsys, monkeypatch) == expected


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nowhere.yaml", "no such file or directory"), (".", "is a directory")],
)
def test_no_file(
    path: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert refused(tmp_path / path, capsys, monkeypatch) == f" cannot be read: {reason}"


def test_what_a_shell_sees(tmp_path: Path) -> None:
    """The real command: exit code 2, one line a mistake, no traceback, nothing written."""
    path = tmp_path / "bad.yaml"
    path.write_text("version: 1\nname: a b\njobs:\n  a: {noop: {sleep: -1}}\n")
    command = [*KVLAB, "validate", "bad.yaml"]
    env = {**os.environ, "KVLAB_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "bad.yaml:2: name: must be 1 to 64 letters, digits, '_', '-' or '.', and not start with "
        "'-' or '.', found 'a b'",
        "bad.yaml:4: jobs.a.noop.sleep: must be at least 0, found -1",
    ]
    assert list(tmp_path.iterdir()) == [path]
    said = json.loads(
        subprocess.run([*command, "--json"], cwd=tmp_path, env=env, capture_output=True).stdout
    )
    assert said["valid"] is False
    assert [problem["line"] for problem in said["problems"]] == [2, 4]


def test_a_good_workflow_writes_nothing_either(good: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(good)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("KVLAB_HOME", None)
    ended = subprocess.run(
        [*KVLAB, "validate", "good.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.stdout == (
        "good.yaml: valid: 28 jobs (data 1, base 3, block 6, quality 9, speed 9)\n"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [path]
