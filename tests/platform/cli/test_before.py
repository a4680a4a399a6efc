"""A workflow that a live process runs is not run twice; one that is done is left as it is."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.cli import before
from kvlab.platform.cli.main import main
from kvlab.platform.controller.lease import owner
from kvlab.platform.home import Home

YAML = "version: 1\nname: mine\njobs:\n  a: {noop: {}}\n"
RUNNING = (
    f"workflow 1 'mine' is running (host {socket.gethostname()}, pid {os.getpid()}): "
    "follow it with `kvlab status 1`, or end it with `kvlab cancel 1`\n"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home, and no Ray: what is tried here has to end before it."""
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "mine.yaml").write_text(YAML)
    found = Home.find()
    found.create()
    return found


def stored(home: Home, name: str = "mine") -> int:
    with Store.open(home.url) as store:
        job = NewJob("a[seed=0]", "a", "noop", {}, {}, {}, (), "a", {})
        return store.create_workflow(name, "", {}, [job], 1.0)


def held(home: Home, workflow: int) -> None:
    """This very process, which lives, has the workflow."""
    with Store.open(home.url) as store:
        store.claim(workflow, owner(), 3600.0, time.time())


def kvlab(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["kvlab", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("words", [("run", "mine.yaml"), ("resume", "mine"), ("resume", "1")])
def test_a_second_run_of_what_a_live_process_runs_is_refused(
    words: tuple[str, ...],
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held(home, stored(home))
    assert kvlab(monkeypatch, *words) == 2
    assert capsys.readouterr().err == RUNNING
    with Store.open(home.url) as store:
        assert len(store.workflows()) == 1


def test_the_newest_is_not_resumed_while_an_older_one_of_its_name_runs(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held(home, stored(home))
    stored(home)
    assert kvlab(monkeypatch, "resume", "mine") == 2
    assert capsys.readouterr().err == RUNNING


def test_another_name_may_run_beside_it_and_is_told_of_the_cpus(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    held(home, stored(home, "other"))
    number = stored(home)
    before.look(home, number, None)
    said = capsys.readouterr().err
    assert said.startswith("workflow 1 'other' is running (host ")
    assert "--cpus" in said
    assert len(said.splitlines()) == 1
    before.look(home, number, 1)  # it was said
    assert capsys.readouterr().err == ""


def test_one_whose_process_died_or_whose_stranger_does_not_renew_is_free(home: Home) -> None:
    number = stored(home)
    place, pid, _ = owner().rsplit(":", 2)
    with Store.open(home.url) as store:
        store.claim(number, f"{place}:{pid}:1", 3600.0, time.time())
    before.look(home, number, 1)
    other = stored(home, "other")
    with Store.open(home.url) as store:
        store.claim(other, "another-host:1:2", 0.2, time.time())
    before.look(home, other, 1)


def done(home: Home, *, mirrored: bool) -> int:
    number = stored(home)
    with Store.open(home.url) as store:
        lease = store.claim(number, "me", 3600.0, time.time())
        job = store.load(number).jobs[0].id
        with store.batch(lease, 2.0) as batch:
            attempt = batch.start(job, "w")
            batch.end(job, attempt, Cause.DONE, JobState.DONE, {})
            if mirrored:
                batch.mirrored(job, step=None, state=JobState.DONE)
        store.release(lease, WorkflowState.DONE, 3.0)
    return number


def test_what_is_done_is_not_begun_again(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done(home, mirrored=True)
    assert kvlab(monkeypatch, "resume", "mine") == 0
    assert capsys.readouterr().out.startswith("workflow 1 is done")


def test_what_mlflow_lacks_is_something_left(home: Home) -> None:
    number = done(home, mirrored=False)
    assert not before.nothing_left(home, number, mlflow=True)
    assert before.nothing_left(home, number, mlflow=False)


def test_a_report_that_could_not_be_written_is_said_before_anything_runs(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvlab(monkeypatch, "run", "mine.yaml", "--html", "missing/report.html") == 2
    assert "there is no folder missing: make it" in capsys.readouterr().err
    with Store.open(home.url) as store:
        assert store.workflows() == []
    assert not Path("missing").exists()
