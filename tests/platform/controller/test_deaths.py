"""Deaths at awkward moments: the controller neither falls over nor waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.db.states import Cause, JobState

pytestmark = pytest.mark.ray

DRIVE = Path(__file__).with_name("drive.py")


@pytest.fixture
def drive(cluster, home):
    """Run a stored workflow in another process, to its end; return its exit code and output."""

    def go(workflow, **environment):
        process = subprocess.run(
            [sys.executable, str(DRIVE), str(home.root), home.url, str(workflow), cluster],
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
