"""Gangs: all workers or none, one rendezvous, and one rank's death ends the attempt."""

from __future__ import annotations

import pytest
import ray

from kvlab import KvlabError
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.controller import attempts
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.pool import Pool
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


@pytest.fixture
def groups(cluster):
    """The names of the placement groups that hold room."""

    def names():
        table = ray.util.placement_group_table().values()
        return {row["name"] for row in table if row["state"] != "REMOVED"}

    return names


def test_a_dead_controllers_gang_gives_its_room_back(cluster, groups, home, cell, submit, store):
    job = cell("a", resources=PAIR, points=40, sleep=4.0)
    number = submit(job)
    first = Pool(home, detached=True, label="gone")
    slot = first.slots.add_busy(PAIR, tuple(first.slots._total) * 2)
    first.create(slot)
    name = first.name(slot.id)
    assert groups() == {name}
    # Another controller that has the same label, and no attempt to take over.
    second = Pool(home, detached=True, label="gone")
    assert second.find(name, (1, 1), 2) is None
    second.sweep()
    assert groups() == set()
    outcome = Controller(home, store, number, detached=True, pool=second).run()
    second.close()
    assert outcome.state is WorkflowState.DONE
    assert groups() == set()


def test_an_adopted_gang_gives_its_room_back(cluster, groups, home):
    first = Pool(home, detached=True, label="lost")
    slot = first.slots.add_busy(PAIR, tuple(first.slots._total) * 2)
    first.create(slot)
    second = Pool(home, detached=True, label="lost")
    name = first.name(slot.id)
    assert second.find(name, None, 2) is not None
    second.adopt(slot.id, name)
    second.sweep()
    assert groups() == {name}
    second.close()
    assert groups() == set()


def test_workers_that_never_come_up_are_given_up(run, cell, monkeypatch):
    monkeypatch.setattr(attempts, "START_SECONDS", 0.0)
    with pytest.raises(KvlabError, match="cannot be started: no worker came up within 0 s"):
        run(cell("a"))
