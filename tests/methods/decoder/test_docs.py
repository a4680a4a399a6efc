"""The code on the decoder's page runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvlab


def test_shown_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(kvlab.__file__).parents[2] / "docs" / "decoder.md"
    shown = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert shown
    for code in shown:
        exec(compile(code, str(page), "exec"), {})
