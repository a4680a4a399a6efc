"""What `kvlab status` prints of a workflow's jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store
from kvlab.platform.cli.main import app
from kvlab.platform.controller.running import WAITED
from kvlab.platform.home import Home

LONG = "quality[" + ",".join(f"axis_{n}=value_{n}" for n in range(12)) + ",seed=0]"
NAMES = ("ran", "first", "behind", "back", "halted", LONG)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """One job ended, one runs, one waits in its worker, one was given back, one was stopped."""
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path))
    monkeypatch.delenv("KVLAB_DATABASE", raising=False)
    found = Home.find()
    found.create()
    with Store.open(found.url) as store:
        jobs = [NewJob(name, name, "noop", {}, {}, {}, (), name, {}) for name in NAMES]
        number = store.create_workflow("w", "", {}, jobs, 1.0)
        ids = {job.name: job.id for job in store.load(number).jobs}
        lease = store.claim(number, "me", 1e12, 1.0)
        with store.batch(lease, time.time()) as batch:
            for name in NAMES[:-1]:
                batch.start(ids[name], "worker")
            batch.end(ids["ran"], 1, Cause.DONE, JobState.DONE, {})
            batch.end(ids["back"], 1, Cause.STOPPED, JobState.QUEUED, message=WAITED)
            batch.end(ids["halted"], 1, Cause.STOPPED, JobState.QUEUED, message="Stopped")
    found.spool(ids["first"], 1).touch()
    return found


def say(*words: str) -> str:
    return CliRunner().invoke(app, ["status", *words], catch_exceptions=False).output


def test_only_what_a_worker_began_is_said_to_run(home: Home) -> None:
    said = say("w")
    rows = {line.split()[0]: line for line in said.splitlines()[2:] if line.strip()}
    assert " running " in rows["first"]
    assert " queued " in rows["behind"]
    assert said.splitlines()[-1].split() == ["4", "queued", "1", "running", "1", "done"]
    counts = json.loads(say("w", "--json"))["counts"]
    assert counts == {"queued": 3, "running": 2, "done": 1}


def test_a_job_given_back_has_no_remark_and_stays_in_json(home: Home) -> None:
    said = say("w")
    assert "waited" not in said
    assert "Stopped" not in said
    assert "stopped" in said
    told = {job["name"]: job["message"] for job in json.loads(say("w", "--json"))["jobs"]}
    assert told["back"] == WAITED


def test_names_are_whole_where_output_is_no_terminal(home: Home) -> None:
    assert LONG in say("w")


def test_names_are_folded_and_not_cut_on_a_narrow_terminal(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlab.platform.cli.console.WIDE", 60)
    said = say("w")
    assert LONG not in said
    assert "…" not in said
    assert LONG in "".join(line.strip().split(" ")[0] for line in said.splitlines())
