"""How long the controller thinks before the next job, with few and with many jobs queued."""

from __future__ import annotations

from time import perf_counter

from kvlab.db.states import Cause, JobState
from kvlab.platform.bench.line import Line, middle
from kvlab.platform.controller.schedule import Schedule, Task
from kvlab.platform.controller.slots import Room, Slots

QUEUES = (100, 10_000)
EVENTS = 2_000
REPEATS = 5


def event_seconds(queued: int) -> list[float]:
    """Seconds of every event: a job ended, which queues another, and the next one is chosen."""
    jobs = range(queued + EVENTS)
    # Every job lets one more into the queue, so that the queue keeps its length.
    schedule = Schedule([Task(job, () if job < queued else (job - queued,)) for job in jobs])
    schedule.begin(
        {job: (JobState.QUEUED if job < queued else JobState.WAITING, 0) for job in jobs}
    )
    slots = Slots({"node": Room(cpus=2)})
    for slot in slots.decide(schedule).create:
        slots.idle(slot.id, 0.0)
    running = slots.decide(schedule).run
    for job, _ in running:
        schedule.started(job, 0.0)
    times = []
    for now in range(EVENTS):
        job, slot_id = running.pop(0)
        start = perf_counter()
        schedule.ended(job, Cause.DONE, float(now))
        slots.idle(slot_id, float(now))
        chosen = slots.decide(schedule).run
        for next_job, _ in chosen:
            schedule.started(next_job, float(now))
        times.append(perf_counter() - start)
        running += chosen
    return times


def run() -> list[Line]:
    """Measure the decision itself, and how its cost grows with the queue."""
    short, long = ([event_seconds(queued) for _ in range(REPEATS)] for queued in QUEUES)
    slowest = middle([max(times) for times in long])
    few = middle([middle(times) for times in short])
    many = middle([middle(times) for times in long])
    return [
        Line(
            f"slowest of {EVENTS} dispatch decisions, {QUEUES[1]:,} jobs queued",
            "ms",
            slowest * 1e3,
            better="less",
            limit=10.0,
        ),
        Line(
            f"an event with {QUEUES[1]:,} jobs queued",
            "µs",
            many * 1e6,
            few * 1e6,
            beside=f"with {QUEUES[0]} queued",
            better="less",
            # Half again as slow at a hundred times the queue would be growth, not noise.
            least_ratio=0.67,
        ),
    ]
