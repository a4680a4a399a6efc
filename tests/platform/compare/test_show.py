"""`show` and `kvlab compare`, from a store to the terminal, JSON and a file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvlab import KvlabError
from kvlab.db.states import JobState
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
    target = tmp_path / "asked.html"
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


def test_a_missing_folder_is_refused_and_not_made(home: Home, tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.raises(CompareError, match=f"there is no folder {tmp_path}/new"):
        show(home, 1, Console(file=out), html=tmp_path / "new" / "report.html")
    assert out.getvalue() == ""
    assert not (tmp_path / "new").exists()


@pytest.fixture
def ended(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """End a run in an empty folder; return the reports that lie there then."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def end(workflow: int) -> set[str]:
        show(home, workflow, Console(file=io.StringIO()), ended=True)
        return {file.name for file in here.iterdir()}

    return end


def test_a_run_leaves_report_html_and_no_other_workflows_is_lost(ended: Any) -> None:
    assert ended(1) == {"report.html"}
    first = Path("report.html").read_text(encoding="utf-8")
    assert ended(2) == {"report.html", "report-second.html"}
    assert Path("report.html").read_text(encoding="utf-8") == first
    assert ended(1) == {"report.html", "report-second.html"}


def test_a_file_that_is_no_report_is_left_alone(ended: Any) -> None:
    Path("report.html").write_text("<html>my own</html>")
    Path("report-first.html").mkdir()
    assert ended(1) == {"report.html", "report-first.html", "report-first-1.html"}
    assert Path("report.html").read_text() == "<html>my own</html>"


def test_nothing_measured_leaves_no_report_and_prints_no_table(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 2):
        state = None if seed == 0 else JobState.RUNNING if seed == 1 else JobState.WAITING
        base = lab.train("base", seed, outcome=state)
        lab.evaluate(base, 3.5, outcome=JobState.WAITING)
        lab.benchmark(base, 100, outcome=JobState.WAITING)
    number = lab.save()
    monkeypatch.chdir(lab.home)
    out = io.StringIO()
    show(Home.find(lab.home), number, Console(file=out, width=100), ended=True)
    assert not Path("report.html").exists()
    assert out.getvalue().splitlines() == [
        "study (workflow 1, done)",
        "• No arm has a number yet.",
        "",
        "Notes",
        "• 8 jobs unfinished.",
    ]


def test_what_is_only_trained_is_shown_and_reported(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train("base", 0)
    monkeypatch.chdir(lab.home)
    out = io.StringIO()
    show(Home.find(lab.home), lab.save(), Console(file=out, width=100), ended=True)
    assert Path("report.html").exists()
    assert "806 k" in out.getvalue()


def test_piped_the_table_is_one_and_names_are_whole(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a" * 60
    base = lab.train(name, 0)
    lab.evaluate(base, 3.5)
    lab.benchmark(base, 100)
    lab.save()
    monkeypatch.setenv("KVLAB_HOME", str(lab.home))
    lines = say("1").splitlines()
    row = next(line for line in lines if f"◆ {name} " in line)
    assert row.rstrip().endswith(" 1")  # the last column, seeds, of the same table
    assert max(len(line) for line in lines) < 400


def test_nothing_there_is_said_as_status_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    status = CliRunner().invoke(app, ["status"], catch_exceptions=False).output
    with pytest.raises(KvlabError) as compared:
        CliRunner().invoke(app, ["compare"], catch_exceptions=False)
    assert status == f"{compared.value}\n"


def test_comparing_changes_nothing_in_the_home(home: Home) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}
    say("first")
    after = {path: path.stat().st_mtime_ns for path in home.root.rglob("*")}
    assert {p.name for p in after.keys() - before.keys()} <= {"kvlab.db-shm", "kvlab.db-wal"}
    assert all(after[path] == when for path, when in before.items() if path.suffix == ".db")
