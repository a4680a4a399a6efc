"""run, resume, status, logs and cancel as a person types them: each starts its own Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvlab.db.errors import NoStore, NotFound
from kvlab.db.states import JobState, WorkflowState
from kvlab.db.store import Store

pytestmark = pytest.mark.ray

YAML = """
version: 1
name: tries
seeds: [0]
jobs:
  long: {noop: {sleep: 6, points: 60, checkpoints: 5}}
  bad: {noop: {fail: user}}
  below: {noop: {}, needs: [bad]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tries.yaml").write_text(YAML)
    return tmp_path


@pytest.fixture
def kvlab(folder):
    """Start `kvlab ...` in a session of its own, as a terminal does."""

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()", *words],
            cwd=folder,
            env={**os.environ, "KVLAB_HOME": str(folder / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def job(folder):
    """Read a job of the stored workflow, None before there is one."""

    def read(name):
        try:
            with Store.open(f"sqlite:///{folder}/home/kvlab.db", read_only=True) as store:
                found = store.load(1).jobs
        except (NoStore, NotFound):
            return None
        return next(one for one in found if one.name.startswith(name))

    return read


def until(condition):
    end = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def checkpointed(job):
    found = job("long")
    return found is not None and found.checkpoint is not None


def test_interrupt_then_resume_then_look(kvlab, job):
    running = kvlab("run", "tries.yaml", "--no-mlflow")
    until(lambda: checkpointed(job))
    os.killpg(running.pid, signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "kvlab resume 1" in out
    assert "Traceback" not in errors
    stopped = job("long")
    assert stopped.state is JobState.QUEUED

    resumed = kvlab("resume", "tries", "--no-mlflow", "--json")
    out, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 1, errors
    told = json.loads(out)
    assert told["state"] == WorkflowState.FAILED
    assert told["counts"] == {"done": 1, "failed": 1, "skipped": 1}
    assert job("long").result["started_from"] >= stopped.checkpoint.step

    status = kvlab("status", "tries", "--json").communicate(timeout=60)[0]
    assert json.loads(status)["counts"] == told["counts"]
    logs = kvlab("logs", "1", "bad").communicate(timeout=60)[0]
    assert "Traceback" in logs


def test_the_driver_is_killed_with_everything_it_started(kvlab, job, folder):
    running = kvlab("run", "tries.yaml", "--no-mlflow")
    until(lambda: checkpointed(job))
    assert job("bad").state is JobState.FAILED or job("bad").attempt <= 1
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    before = job("long")
    assert before.state is JobState.RUNNING

    resumed = kvlab("resume", "--no-mlflow", "--json")
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 1, errors
    after = job("long")
    assert after.state is JobState.DONE
    assert after.attempts[-1].from_step >= before.checkpoint.step
    with Store.open(f"sqlite:///{folder}/home/kvlab.db") as store:
        steps = [point.step for point in store.points(after.id)]
    assert steps == list(range(1, 61))


def test_cancel_from_another_process(kvlab, job):
    running = kvlab("run", "tries.yaml", "--no-mlflow", "--json")
    until(lambda: checkpointed(job))
    cancel = kvlab("cancel", "tries")
    assert cancel.communicate(timeout=60)[0] == "workflow 1 cancelled\n"
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert json.loads(out)["state"] == WorkflowState.CANCELLED
    again = kvlab("cancel", "tries")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 2
    assert "nothing to cancel" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "tries.yaml", "--detach"], "--detach needs --address"),
        (["resume"], "kvlab run"),
        (["status", "nope"], "kvlab run"),
        (["logs", "nope"], "kvlab run"),
        (["cancel", "nope"], "kvlab run"),
    ],
)
def test_mistakes_are_one_line(kvlab, folder, words, said):
    process = kvlab(*words)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in errors
    assert len(errors.splitlines()) == 1
    assert not (folder / "home").exists()
