"""The job that does what it is told: points, checkpoints, stopping, and every way to fail."""

import errno
import subprocess
import sys

import pytest

from kvlab.platform.jobs.context import Diverged, JobError, Stopped
from kvlab.platform.jobs.local import LocalContext, run_cell
from kvlab.platform.jobs.noop.run import run

SPEC = {"sleep": 0.0, "points": 6, "fail": None, "checkpoints": 2, "fail_at": None}


def context(tmp_path, **given):
    return LocalContext(folder=tmp_path, checkpoints=tmp_path / "kept", **given)


def test_it_logs_and_goes_on_from_its_checkpoint(tmp_path):
    first = context(tmp_path, stop_after=5)
    with pytest.raises(Stopped):
        run(SPEC, first)
    assert set(first.points) == {("value", step) for step in range(1, 6)}
    second = context(tmp_path)
    assert run(SPEC, second) == {"points": 6, "started_from": 4}
    assert set(second.points) == {("value", 5), ("value", 6)}


FAILURES = [("nan", Diverged), ("oom", MemoryError), ("user", JobError), ("disk", OSError)]


@pytest.mark.parametrize(("how", "kind"), FAILURES)
@pytest.mark.parametrize("at", [None, 3])
def test_it_fails_as_named(tmp_path, how, kind, at):
    given = context(tmp_path)
    with pytest.raises(kind) as caught:
        run({**SPEC, "fail": how, "fail_at": at}, given)
    assert len(given.points) == (6 if at is None else at)
    if how == "disk":
        assert caught.value.errno == errno.ENOSPC


def test_exit_ends_the_process(tmp_path):
    program = (
        "from kvlab.platform.jobs.local import run_cell; from pathlib import Path; "
        "run_cell('noop', {'sleep': 0, 'points': 1, 'fail': 'exit'}, {}, Path(%r))"
    )
    done = subprocess.run([sys.executable, "-c", program % str(tmp_path)], timeout=60)
    assert done.returncode == 17


def test_a_bare_spec_is_enough(tmp_path):
    spec = {"sleep": 0.0, "points": 0, "fail": None}
    assert run_cell("noop", spec, {}, tmp_path / "out") == {"points": 0, "started_from": 0}
