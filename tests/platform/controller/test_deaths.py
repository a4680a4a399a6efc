"""Deaths at awkward moments: the controller neither falls over nor waits for ever."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.pool import Pool
from kvlab.platform.record.fault import POINTS

pytestmark = pytest.mark.ray

DRIVE = Path(__file__).with_name("drive.py")


@pytest.fixture
def drive(cluster, home):
    """Run a stored workflow in another process, to its end; return its exit code and output."""

    def go(workflow, *label, **environment):
        words = [str(DRIVE), str(home.root), home.url, str(workflow), cluster, *label]
        process = subprocess.run(
            [sys.executable, *words],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return process.returncode, process.stdout + process.stderr

    return go


def causes(job):
    return [attempt.cause for attempt in job.attempts]


def test_a_worker_that_dies_after_a_failed_end_fells_nobody(drive, submit, cell, store, tmp_path):
    mark = tmp_path / "mark"
    retries = {Cause.OUT_OF_MEMORY: 1}
    number = submit(cell("a", fail="oom", retries=retries), cell("b", sleep=1.0))
    code, said = drive(number, KVLAB_FAULT="spool.after_end", KVLAB_FAULT_MARK=str(mark))
    assert code == 0, said
    assert mark.exists()
    assert json.loads(said.splitlines()[-1]) == {"state": "failed"}
    jobs = {job.name: job for job in store.load(number).jobs}
    assert causes(jobs["a"]) == [Cause.OUT_OF_MEMORY] * 2
    assert jobs["b"].state is JobState.DONE


CLUSTER_POINTS = [
    one for one in POINTS if one.partition(".")[0] in ("start", "record", "end", "finish")
]


@pytest.mark.parametrize("point", CLUSTER_POINTS)
def test_a_cluster_controller_dies_at(point, drive, submit, cell, store, home):
    long = {"points": 12, "checkpoints": 3, "sleep": 0.6}
    number = submit(cell("a", **long), cell("b", "a", **long))
    label = f"test-{number}-{secrets.token_hex(4)}"
    count = 2 if point.startswith(("start", "record")) else 1
    code, said = drive(number, label, KVLAB_FAULT=f"{point}:{count}")
    assert code == -signal.SIGKILL, said
    pool = Pool(home, detached=True, label=label)
    try:
        outcome = Controller(home, store, number, detached=True, pool=pool).run()
    finally:
        pool.close()
    assert outcome.state is WorkflowState.DONE
    for job in store.load(number).jobs:
        assert [point.step for point in store.points(job.id)] == list(range(1, 13))
        assert set(causes(job)) <= {Cause.STOPPED, Cause.DONE}


def test_a_checkpoint_that_the_store_did_not_hear_of_is_found(run, cell, store, home):
    _, jobs = run(cell("a", points=20, checkpoints=5, sleep=2.0, fail="user", fail_at=17))
    job = jobs["a"]
    folder = home.checkpoints(job.identity, job.id)
    newest = max(folder.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    assert newest.name in ("1-10", "1-15")
    # As if the attempt had been ended between the rename and the store's hearing of it.
    with sqlite3.connect(home.root / "kvlab.db") as database:
        database.execute(
            "UPDATE artifacts SET step = 5, uri = ? WHERE role = 'checkpoint'", [str(folder / "0")]
        )
    _, jobs = run(1)
    assert jobs["a"].attempts[1].from_step == int(newest.name.partition("-")[2])
    assert [point.step for point in store.points(job.id)] == list(range(1, 18))
