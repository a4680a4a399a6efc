"""Kills on the real thing: whatever dies, and when, `resume` ends with the same rows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.controller.controller import Controller
from kvlab.platform.record.fault import POINTS

pytestmark = pytest.mark.ray

DRIVE = Path(__file__).with_name("drive.py")
STEPS = 12
IN_WORKER = ("checkpoint", "publish", "spool")
RANDOM_KILLS = int(os.environ.get("KVLAB_RANDOM_KILLS", "3"))


@pytest.fixture
def workflow(submit, cell):
    """Jobs that log, checkpoint, publish and need each other: about two seconds in all."""
    long = {"points": STEPS, "checkpoints": 3, "sleep": 0.9, "publish": True}
    retries = {Cause.NODE_LOST: 3}
    return submit(
        cell("a", retries=retries, **long),
        cell("quick", points=2, retries=retries),
        cell("b", "a", retries=retries, **long),
        cell("c", "a", "quick", points=2, retries=retries),
    )


@pytest.fixture
def drive(cluster, home, workflow):
    """Start the workflow's controller in another process."""

    def start(**environment):
        return subprocess.Popen(
            [sys.executable, str(DRIVE), str(home.root), home.url, str(workflow), cluster],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(jobs):
    return {job.name: job.attempt for job in jobs if job.state is JobState.DONE}


@pytest.fixture
def check(store, home, workflow):
    """The workflow is done, as if nothing had happened."""

    def look(before=()):
        stored = store.load(workflow)
        assert stored.row.state is WorkflowState.DONE
        jobs = {job.name: job for job in stored.jobs}
        for name, points in (("a", STEPS), ("b", STEPS), ("quick", 2), ("c", 2)):
            job = jobs[name]
            assert job.state is JobState.DONE
            assert job.result["points"] == points
            found = [(point.step, point.value) for point in store.points(job.id)]
            assert found == [(step, step - 1.0) for step in range(1, points + 1)]
            assert sum(attempt.cause is Cause.DONE for attempt in job.attempts) == 1
            assert all(attempt.ended_at is not None for attempt in job.attempts)
        for name, attempts in dict(before).items():
            assert jobs[name].attempt == attempts, f"{name} was finished and ran again"
        for name in ("a", "b"):
            assert json.loads((home.artifact(f"identity-of-{name}") / "noop.json").read_text())
        for folder in ("spool", "work", "checkpoints"):
            assert list((home.root / folder).iterdir()) == [], folder

    return look


def resume(home, store, workflow, pool):
    """Go on as another process would: from SQL and the home alone."""
    acknowledged = {
        job.id: {(point.key, point.step) for point in store.points(job.id)}
        for job in store.load(workflow).jobs
    }
    outcome = Controller(home, store, workflow, pool=pool).run()
    for job, points in acknowledged.items():
        assert points <= {(point.key, point.step) for point in store.points(job)}
    return outcome


@pytest.mark.parametrize("point", [p for p in POINTS if not p.startswith(IN_WORKER)])
def test_the_controller_dies_at(point, drive, check, home, store, workflow, pool):
    # Not the first time it is passed, so that there is something to lose.
    count = 1 if point.startswith("finish") else 2
    process = drive(KVLAB_FAULT=f"{point}:{count}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    before = finished(store.load(workflow).jobs)
    resume(home, store, workflow, pool)
    check(before)


@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith(IN_WORKER)])
def test_a_worker_dies_at(point, drive, check, tmp_path):
    mark = tmp_path / "mark"
    process = drive(KVLAB_FAULT=point, KVLAB_FAULT_MARK=str(mark))
    out, errors = process.communicate(timeout=60)
    assert mark.exists()
    assert json.loads(out.splitlines()[-1]) == {"state": "done"}, errors
    check()


@pytest.mark.parametrize("seed", range(RANDOM_KILLS))
def test_the_controller_dies_at_any_instant(seed, drive, check, home, store, workflow, pool):
    process = drive()
    while store.status(workflow).jobs[0].state is JobState.QUEUED and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 2.5))
    process.kill()
    process.communicate()
    before = finished(store.load(workflow).jobs)
    resume(home, store, workflow, pool)
    check(before)
