"""From spool to SQL: every point once, whatever is read twice, torn, or told by an old attempt."""

from __future__ import annotations

import pytest

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store
from kvlab.platform.record.recorder import Tail
from kvlab.platform.record.spool import SpoolWriter


@pytest.fixture
def store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as opened:
        yield opened


@pytest.fixture
def lease(store):
    job = NewJob("a", "a", "noop", {}, {}, {}, (), "id", {})
    return store.claim(store.create_workflow("w", "", {}, [job], 0.0), "me", 60.0, 0.0)


@pytest.fixture
def spool(tmp_path):
    writer = SpoolWriter(tmp_path / "1-1.jsonl")
    yield writer
    writer.close()


def begin(store, lease):
    with store.batch(lease, 1.0) as batch:
        return batch.start(1, "worker")


def commit(store, lease, tail):
    with store.batch(lease, 2.0) as batch:
        stored = tail.write(batch)
    tail.committed()
    return stored


def test_points_are_stored_and_acknowledged(store, lease, spool):
    tail = Tail(1, begin(store, lease))
    for step in range(10):
        spool.points(step, step, {"loss": float(step)})
    tail.take(0, spool.read(0))
    assert tail.acknowledged == 0
    assert commit(store, lease, tail) == 10
    assert tail.acknowledged == spool.size
    assert [point.value for point in store.points(1)] == [float(step) for step in range(10)]


def test_pieces_may_overlap_and_lines_may_be_torn(store, lease, spool):
    tail = Tail(1, begin(store, lease))
    for step in range(20):
        spool.points(step, step, {"loss": float(step)})
    data = spool.read(0)
    for offset in range(0, len(data), 7):
        start = max(0, min(offset, tail.offset) - 11)
        tail.take(start, data[start : offset + 7])
    assert tail.offset == len(data)
    commit(store, lease, tail)
    assert len(store.points(1)) == 20


def test_a_gap_is_not_read(spool):
    spool.points(1, 1, {"a": 1.0})
    tail = Tail(1, 1)
    tail.take(5, spool.read(5))
    assert tail.offset == 0


def test_checkpoints_and_the_end_are_told(store, lease, spool, tmp_path):
    tail = Tail(1, begin(store, lease))
    spool.checkpoint(5, "five")
    spool.checkpoint(9, "nine")
    spool.end({"cause": "done", "result": {"loss": 1.0}})
    tail.take_file(tmp_path / "1-1.jsonl")
    assert tail.checkpoint == (9, "nine")
    assert tail.end == {"cause": "done", "result": {"loss": 1.0}}
    commit(store, lease, tail)
    (job,) = store.load(lease.workflow_id).jobs
    assert job.checkpoint.step == 9


def test_a_spool_read_again_doubles_nothing(store, lease, spool, tmp_path):
    attempt = begin(store, lease)
    for step in range(5):
        spool.points(step, step, {"loss": float(step)})
    for _ in range(2):
        tail = Tail(1, attempt)
        tail.take_file(tmp_path / "1-1.jsonl")
        commit(store, lease, tail)
    assert len(store.points(1)) == 5


def test_a_superseded_attempt_is_not_heard(store, lease, spool):
    old = Tail(1, begin(store, lease))
    with store.batch(lease, 2.0) as batch:
        batch.end(1, old.attempt, Cause.NODE_LOST, JobState.QUEUED)
    new = begin(store, lease)
    spool.points(1, 1, {"loss": 1.0})
    old.take(0, spool.read(0))
    assert commit(store, lease, old) == 0
    assert store.points(1) == []
    assert new == old.attempt + 1
