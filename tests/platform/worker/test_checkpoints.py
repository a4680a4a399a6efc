"""Checkpoints are visible only when their points are stored, and only whole."""

from __future__ import annotations

import errno
import time

import pytest

from kvlab.platform.record.spool import SpoolWriter, records
from kvlab.platform.worker.checkpoints import Checkpoints, newest, sweep

SOON = 10.0


@pytest.fixture
def spool(tmp_path):
    writer = SpoolWriter(tmp_path / "spool")
    yield writer
    writer.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def checkpoints(folder, spool):
    made = Checkpoints(folder, 1, spool)
    yield made
    made.close()


def writing(text):
    return lambda folder: (folder / "state").write_text(text)


def test_it_waits_for_the_points_before_it(checkpoints, spool, folder):
    spool.points(1, 0, {"a": 1.0})
    checkpoints.save(1, writing("one"))
    checkpoints.acknowledge(spool.size - 1)
    assert checkpoints.hungry
    assert newest(folder, 1) is None
    checkpoints.acknowledge(spool.size)
    checkpoints.settle(SOON)
    step, path = newest(folder, 1)
    assert (step, (folder / "1-1" / "state").read_text()) == (1, "one")
    assert records(spool.read(0))[0][-1] == ["c", 1, path]


def test_only_the_newest_stays(checkpoints, folder):
    for step in (1, 2, 3):
        checkpoints.save(step, writing(str(step)))
        checkpoints.acknowledge(10**6)
        checkpoints.settle(SOON)
    assert [path.name for path in folder.iterdir()] == ["1-3"]


def test_the_one_the_store_names_stays(checkpoints, spool, folder):
    # Between a rename and the acknowledgement of its record the store names the one before.
    for step in (10, 20):
        checkpoints.save(step, writing(str(step)))
        checkpoints.acknowledge(spool.size)
        checkpoints.settle(SOON)
    assert sorted(path.name for path in folder.iterdir()) == ["1-10", "1-20"]
    checkpoints.acknowledge(spool.size)
    end = time.monotonic() + SOON
    while (folder / "1-10").exists():
        assert time.monotonic() < end
    assert [path.name for path in folder.iterdir()] == ["1-20"]


def test_frequent_checkpoints_do_not_starve_the_oldest(checkpoints, spool, folder):
    spool.points(1, 0, {"a": 1.0})
    first = spool.size
    for step in range(1, 6):
        checkpoints.save(step, writing(str(step)))
        spool.points(step + 1, 0, {"a": 1.0})
    checkpoints.acknowledge(first)
    while checkpoints.hungry and newest(folder, 1) is None:
        checkpoints.settle(0.01)
    assert newest(folder, 1)[0] == 1
    checkpoints.acknowledge(spool.size)
    checkpoints.settle(SOON)
    assert newest(folder, 1)[0] == 5


def test_a_failed_write_leaves_nothing(checkpoints, folder):
    def full(path):
        (path / "part").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(1, full)
    assert list(folder.iterdir()) == []


def test_an_error_behind_the_scenes_reaches_the_job(checkpoints, folder, spool):
    checkpoints.save(1, writing("one"))
    (folder / "1-1").write_text("a file is in the way")
    checkpoints.acknowledge(10**6)
    with pytest.raises(OSError):
        checkpoints.settle(SOON)
    with pytest.raises(OSError):
        checkpoints.save(2, writing("two"))


def test_what_was_not_acknowledged_is_given_up(checkpoints, spool, folder):
    spool.points(1, 0, {"a": 1.0})
    checkpoints.save(1, writing("one"))
    checkpoints.close()
    assert list(folder.iterdir()) == []


def test_an_attempt_sweeps_what_earlier_ones_left(folder):
    for name in ("1-5", "2-7", "tmp-2-9", "3-8"):
        (folder / name).mkdir(parents=True)
    sweep(folder, 3, folder / "2-7")
    assert sorted(path.name for path in folder.iterdir()) == ["2-7", "3-8"]


def test_checkpoints_of_another_attempt_are_not_ones_own(folder):
    (folder / "1-50").mkdir(parents=True)
    (folder / "2-10").mkdir()
    assert newest(folder, 2) == (10, str(folder / "2-10"))
