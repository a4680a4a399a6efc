"""Metric points: one per job, key and step, from the attempt that counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvlab.db.rows import Checkpoint, Point
from kvlab.db.states import Cause, JobState


@pytest.fixture
def job(lab: Any) -> int:
    """A job whose first attempt runs."""
    lab.start(lab.jobs[0])
    return int(lab.jobs[0])


def retry(lab: Any, job: int, from_step: int | None) -> int:
    """End the running attempt and start the next from a checkpoint."""
    attempt = lab.row(job).attempt
    assert lab.end(job, attempt, Cause.NODE_LOST, JobState.QUEUED)
    with lab.batch() as batch:
        attempt = batch.start(job, "worker")
        assert batch.rewind(job, attempt, from_step)
    return int(attempt)


def test_points_come_back_by_key_and_step(lab: Any, job: int) -> None:
    with lab.batch() as batch:
        assert batch.points(job, 1, [("loss", 2, 0.5, 20), ("lr", 1, 1e-3, 11)]) == 2
        assert batch.points(job, 1, [("loss", 1, 0.75, 10)]) == 1
    assert lab.store.points(job) == [
        Point("loss", 1, 0.75, 10, 1),
        Point("loss", 2, 0.5, 20, 1),
        Point("lr", 1, 1e-3, 11, 1),
    ]
    assert [p.step for p in lab.store.points(job, ["loss"])] == [1, 2]
    assert [p.step for p in lab.store.points(job, ["loss"], after_step=1)] == [2]
    assert [p.key for p in lab.store.points(job, up_to_step=1)] == ["loss", "lr"]
    assert lab.store.points(job, []) == []
    assert lab.store.points(lab.jobs[1]) == []


def test_a_point_sent_again_is_not_doubled_and_the_last_counts(lab: Any, job: int) -> None:
    assert lab.log(job, 1, ("loss", 1, 0.9), ("loss", 1, 0.8)) == 1
    assert lab.log(job, 1, ("loss", 1, 0.8)) == 1
    assert lab.values(job) == [("loss", 1, 0.8, 1)]
    lab.log(job, 1, ("loss", 1, 0.7))
    assert lab.values(job) == [("loss", 1, 0.7, 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, 5e-324, 1.7e308])
def test_every_number_survives(lab: Any, job: int, value: float) -> None:
    lab.log(job, 1, ("loss", 1, value))
    lab.log(job, 1, ("loss", 1, value))
    (point,) = lab.store.points(job)
    assert point.value == value or (math.isnan(point.value) and math.isnan(value))


def test_no_points_are_no_statement(lab: Any, job: int) -> None:
    assert lab.log(job, 1) == 0


@pytest.mark.parametrize("step", [0, -1, 2**63 - 1])
def test_any_step_of_eight_bytes(lab: Any, job: int, step: int) -> None:
    lab.log(job, 1, ("loss", step, 1.0))
    assert lab.values(job) == [("loss", step, 1.0, 1)]


def test_any_key(lab: Any, job: int) -> None:
    lab.log(job, 1, ("train/loss", 1, 1.0), ("a'b\"%s", 1, 2.0), ("NUL\0", 1, 3.0), ("é", 1, 4.0))
    assert [p.key for p in sorted(lab.store.points(job), key=lambda p: p.value)] == [
        "train/loss",
        "a'b\"%s",
        "NUL\ufffd",
        "é",
    ]


def test_the_last_points_of_an_attempt_may_follow_its_end(lab: Any, job: int) -> None:
    lab.end(job, 1, Cause.NODE_LOST, JobState.QUEUED)
    assert lab.log(job, 1, ("loss", 3, 0.5)) == 1
    assert lab.start(job) == 2
    assert lab.log(job, 1, ("loss", 4, 0.5)) == 0
    assert lab.values(job) == [("loss", 3, 0.5, 1)]


def test_a_newer_attempt_replaces_what_followed_its_checkpoint(lab: Any, job: int) -> None:
    lab.log(job, 1, *[(key, step, 1.0) for key in ("loss", "lr") for step in range(1, 6)])
    attempt = retry(lab, job, 3)
    kept = [(key, step, 1.0, 1) for key in ("loss", "lr") for step in (1, 2, 3)]
    assert lab.values(job) == kept
    assert lab.log(job, attempt, ("loss", 4, 2.0)) == 1
    assert lab.log(job, 1, ("loss", 4, 9.0), ("loss", 5, 9.0)) == 0
    assert lab.values(job) == sorted([*kept, ("loss", 4, 2.0, 2)])
    assert lab.row(job).attempts[1].from_step == 3


def test_an_attempt_from_nothing_replaces_everything(lab: Any, job: int) -> None:
    lab.log(job, 1, ("loss", 0, 1.0), ("loss", 7, 1.0))
    attempt = retry(lab, job, None)
    assert lab.values(job) == []
    assert lab.row(job).attempts[1].from_step is None
    lab.log(job, attempt, ("loss", 0, 2.0))
    with lab.batch() as batch:
        assert batch.rewind(job, attempt, None)
    assert lab.values(job) == [("loss", 0, 2.0, 2)]


def test_rewinding_after_the_start_was_written_notes_the_checkpoint(lab: Any, job: int) -> None:
    with lab.batch() as batch:
        batch.rewind(job, 1, 40)
    assert lab.row(job).attempts[0].from_step == 40


def test_the_newest_checkpoint_takes_the_place_of_the_older(lab: Any, job: int) -> None:
    assert lab.row(job).checkpoint is None
    for step in (10, 20):
        with lab.batch() as batch:
            assert batch.checkpoint(job, 1, step, f"file:///step{step}")
    assert lab.row(job).checkpoint == Checkpoint(20, "file:///step20", 1)
    attempt = retry(lab, job, 20)
    assert lab.row(job).checkpoint == Checkpoint(20, "file:///step20", 1)
    with lab.batch() as batch:
        assert batch.checkpoint(job, attempt, 30, "file:///step30")
    assert lab.row(job).checkpoint == Checkpoint(30, "file:///step30", 2)


@pytest.mark.parametrize("from_step", [None, 9])
def test_a_checkpoint_whose_points_are_dropped_goes_with_them(
    lab: Any, job: int, from_step: int | None
) -> None:
    with lab.batch() as batch:
        batch.checkpoint(job, 1, 10, "file:///unreadable")
    retry(lab, job, from_step)
    assert lab.row(job).checkpoint is None


@pytest.mark.parametrize(("from_step", "kept"), [(None, False), (9, False), (10, True)])
def test_the_same_within_one_batch(lab: Any, job: int, from_step: int | None, kept: bool) -> None:
    with lab.batch() as batch:
        batch.checkpoint(job, 1, 10, "file:///x")
        batch.end(job, 1, Cause.NODE_LOST, JobState.QUEUED)
        batch.rewind(job, batch.start(job, "worker"), from_step)
    assert (lab.row(job).checkpoint is not None) is kept


def test_an_attempt_that_ended_shows_no_more_checkpoints(lab: Any, job: int) -> None:
    lab.end(job, 1, Cause.DONE, JobState.DONE, result={})
    with lab.batch() as batch:
        assert not batch.checkpoint(job, 1, 10, "file:///late")
    assert lab.row(job).checkpoint is None
