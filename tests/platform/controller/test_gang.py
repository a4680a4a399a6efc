"""Gangs: all workers or none, one rendezvous, and one rank's death ends the attempt."""

from __future__ import annotations

import pytest

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.graph import Resources

pytestmark = pytest.mark.ray

PAIR = Resources(cpus=1, workers=2)


def causes(job):
    return [attempt.cause for attempt in job.attempts]


def test_two_workers_meet_over_gloo_and_a_warm_gang_meets_again(run, cell, store):
    outcome, jobs = run(
        cell("one", resources=PAIR, points=5), cell("two", "one", resources=PAIR), cell("small")
    )
    assert outcome.state is WorkflowState.DONE
    assert jobs["one"].result["met"] == jobs["two"].result["met"] == 2
    assert jobs["one"].attempts[0].worker == jobs["two"].attempts[0].worker
    # Rank 0 alone logs.
    assert len(store.points(jobs["one"].id)) == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_death_ends_the_attempt(run, cell, rank):
    dies = cell(
        "dies",
        resources=PAIR,
        sleep=60.0,
        points=600,
        fail="exit",
        fail_at=1,
        fail_rank=rank,
    )
    _, jobs = run(dies, cell("other"))
    assert causes(jobs["dies"]) == [Cause.NODE_LOST]
    assert jobs["dies"].state is JobState.FAILED
    assert jobs["other"].state is JobState.DONE


def test_a_ranks_own_failure_is_the_cause(run, cell):
    _, jobs = run(
        cell("a", resources=PAIR, sleep=60.0, points=600, fail="oom", fail_at=1, fail_rank=1)
    )
    assert causes(jobs["a"]) == [Cause.OUT_OF_MEMORY]
