"""Which worker gets a job: warm ones first, never more than the nodes hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import KvlabError
from kvlab.db.states import Cause, JobState
from kvlab.platform.controller.schedule import Schedule, Task
from kvlab.platform.controller.slots import IDLE_SECONDS, Room, Slots, check_fit, node_room
from kvlab.platform.graph import Resources

ONE, TWO = Resources(cpus=1), Resources(cpus=2)
ALONE = Resources(exclusive=True)
GANG = Resources(cpus=1, workers=2)


def queued(*shapes):
    tasks = [Task(job, resources=shape) for job, shape in enumerate(shapes)]
    schedule = Schedule(tasks)
    schedule.begin({task.id: (JobState.QUEUED, 0) for task in tasks})
    return schedule


def start(schedule, decision):
    for job, _ in decision.run:
        schedule.started(job, 0.0)


def warm(slots, schedule):
    """Create what is asked for, let it come up, and run what can."""
    for slot in slots.decide(schedule).create:
        slots.idle(slot.id, 0.0)
    decision = slots.decide(schedule)
    start(schedule, decision)
    return decision


def test_workers_are_made_side_by_side_and_no_more_than_fit():
    slots = Slots({"a": Room(2)})
    schedule = queued(ONE, ONE, ONE)
    assert len(slots.decide(schedule).create) == 2
    assert slots.decide(schedule).create == []


def test_a_freed_worker_is_used_again():
    slots = Slots({"a": Room(1)})
    schedule = queued(ONE, ONE)
    ((_, slot),) = warm(slots, schedule).run
    schedule.ended(0, Cause.DONE, 1.0)
    slots.idle(slot, 1.0)
    decision = slots.decide(schedule)
    assert decision.run == [(1, slot)]
    assert decision.create == decision.kill == []


def test_an_idle_worker_makes_room_for_another_shape():
    slots = Slots({"a": Room(2)})
    schedule = queued(ONE, ONE, TWO)
    run = warm(slots, schedule).run
    for job, slot in run:
        schedule.ended(job, Cause.DONE, 1.0)
        slots.idle(slot, 1.0)
    decision = slots.decide(schedule)
    assert sorted(decision.kill) == sorted(slot for _, slot in run)
    assert [slot.shape for slot in decision.create] == [TWO]


def test_a_large_job_does_not_hold_up_small_ones():
    slots = Slots({"a": Room(2)})
    schedule = queued(ONE, TWO, ONE)
    assert [job for job, _ in warm(slots, schedule).run] == [0, 2]


def test_an_exclusive_job_has_the_node_to_itself_and_all_its_threads():
    slots = Slots({"a": Room(4)})
    schedule = queued(ONE, ALONE)
    ((_, slot),) = warm(slots, schedule).run
    assert [one.shape for one in slots.decide(schedule).create] == []
    schedule.ended(0, Cause.DONE, 1.0)
    slots.idle(slot, 1.0)
    decision = slots.decide(schedule)
    assert decision.kill == [slot]
    assert decision.create[0].threads == 4


def test_a_gang_takes_all_its_places_or_none():
    slots = Slots({"a": Room(1), "b": Room(1)})
    schedule = queued(ONE, GANG)
    ((_, slot),) = warm(slots, schedule).run
    assert slots.decide(schedule).create == []
    schedule.ended(0, Cause.DONE, 1.0)
    slots.idle(slot, 1.0)
    (created,) = slots.decide(schedule).create
    assert sorted(node for node, _ in created.places) == ["a", "b"]


def test_gpus_are_left_to_those_who_ask_for_them():
    slots = Slots({"gpu": Room(8, 1), "cpu": Room(8)})
    (created,) = slots.decide(queued(ONE)).create
    assert created.places[0][0] == "cpu"


def test_idle_workers_end_after_a_minute():
    slots = Slots({"a": Room(1)})
    schedule = queued(ONE)
    ((_, slot),) = warm(slots, schedule).run
    schedule.ended(0, Cause.DONE, 0.0)
    slots.idle(slot, 10.0)
    assert slots.expire(10.0 + IDLE_SECONDS - 1) == []
    assert slots.expire(10.0 + IDLE_SECONDS) == [slot]
    assert len(slots) == 0


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (Resources(cpus=3), "cpus"),
        (Resources(gpus=1), "gpus"),
        (Resources(memory=1), "memory"),
        (Resources(workers=3), "workers"),
    ],
)
def test_what_never_fits_is_said_by_name_and_place(shape, key):
    said = rf"^jobs\.big\.resources\.{key}: job 'big\[x=1\]' asks for .* a node of 2 CPUs"
    with pytest.raises(KvlabError, match=said):
        check_fit([("small", ONE), ("big[x=1]", shape)], Slots({"a": Room(2)}))


def test_a_nodes_room_is_read_from_ray():
    room = node_room({"CPU": 2.0, "memory": 5e9, "node:10.0.0.1": 1.0})
    assert room == Room(2.0, 0.0, 5e9)


def test_a_quick_worker_is_given_the_next_jobs_before_it_asks():
    slots = Slots({"a": Room(1)}, depth=3)
    schedule = queued(*[ONE] * 8)
    ((_, slot),) = warm(slots, schedule).run
    schedule.ended(0, Cause.DONE, 1.0)
    slots.idle(slot, 1.0, quick=True)
    decision = slots.decide(schedule)
    start(schedule, decision)
    assert decision.run == [(1, slot), (2, slot), (3, slot)]
    schedule.ended(1, Cause.DONE, 2.0)
    slots.idle(slot, 2.0, quick=False)
    assert slots.decide(schedule).run == []
    assert slots[slot].jobs == 2


def test_gangs_and_measurements_are_never_queued_behind():
    for shape in (GANG, ALONE):
        slots = Slots({"a": Room(2)})
        schedule = queued(shape, shape)
        ((_, slot),) = warm(slots, schedule).run
        schedule.ended(0, Cause.DONE, 1.0)
        slots.idle(slot, 1.0, quick=True)
        assert len(slots.decide(schedule).run) == 1


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([ONE, TWO, ALONE, GANG, Resources(cpus=1, gpus=1)]), min_size=1),
    st.data(),
)
def test_nodes_are_never_overbooked_and_every_job_runs(shapes, data):
    nodes = {"a": Room(2), "b": Room(3, 1)}
    slots, schedule = Slots(nodes), queued(*shapes)
    alive, running = {}, {}
    for now in range(1000):
        decision = slots.decide(schedule)
        for slot in decision.kill:
            assert slot not in running
            del alive[slot]
        for slot in decision.create:
            alive[slot.id] = slot
            slots.idle(slot.id, float(now))
        for job, slot in decision.run:
            assert slot not in running
            schedule.started(job, float(now))
            running[slot] = job
        for node, room in nodes.items():
            used = [r for slot in alive.values() for where, r in slot.places if where == node]
            assert sum(r.cpus for r in used) <= room.cpus
            assert sum(r.gpus for r in used) <= room.gpus
            if any(slot.shape.exclusive for slot in alive.values() if slot.places[0][0] == node):
                assert len(used) == 1
        if schedule.finished:
            return
        if running:
            slot = data.draw(st.sampled_from(sorted(running)))
            schedule.ended(running.pop(slot), Cause.DONE, float(now))
            slots.idle(slot, float(now))
    raise AssertionError("not all jobs ran")
