"""`show` and `kvlab compare`, from a store to the terminal, JSON and a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvlab.platform.cli.main import app
from kvlab.platform.compare import CompareError, show
from kvlab.platform.home import Home


@pytest.fixture
def home(quickstart: Any, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with two workflows: `first` (1) and `second` (2)."""
    quickstart.save(name="first")
    quickstart.save(name="second")
    monkeypatch.setenv("KVLAB_HOME", str(quickstart.home))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    return Home.find()


def say(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_a_workflow_is_found_by_name_number_or_as_the_newest(home: Home) -> None:
    assert "first (workflow 1, done)" in say("first")
    assert "second (workflow 2, done)" in say("2")
    assert "second (workflow 2, done)" in say()


def test_json_is_all_that_is_printed(home: Home) -> None:
    raw = json.loads(say("first", "--json"))
    assert (raw["name"], len(raw["arms"])) == ("first", 3)


def test_the_report_is_written_where_asked(home: Home, tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    out = io.StringIO()
    comparison = show(home, 1, Console(file=out, width=100), html=target)
    assert comparison.name == "first"
    assert str(target) in out.getvalue().replace("\n", "")
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_and_a_report_together_stay_json(home: Home, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    json.loads(say("first", "--json", "--html", str(target)))
    assert target.is_file()


def test_a_report_that_cannot_be_written_is_one_line(home: Home, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="name another file"):
        show(home, 1, Console(file=io.StringIO()), html=tmp_path)


def test_comparing_changes_nothing_in_the_home(home: Home) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}
    say("first")
    after = {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}
    assert {p.name for p in after.keys() - before.keys()} <= {"kvlab.db-shm", "kvlab.db-wal"}
    assert all(after[path] == when for path, when in before.items() if path.suffix == ".db")
