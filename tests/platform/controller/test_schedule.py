"""The scheduling core under a fake clock: every job ends, once, in the state its fate asks for."""

from __future__ import annotations

from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.db.states import MOVES, Cause, JobState
from kvlab.platform.controller.schedule import Move, Schedule, Task, backoff
from kvlab.platform.graph import Resources

ONE = Resources()


def fresh(tasks, **options):
    schedule = Schedule(tasks, **options)
    schedule.begin({task.id: (JobState.WAITING, 0) for task in tasks})
    return schedule


def take_all(schedule, now=0.0):
    taken = []
    for shape in schedule.shapes():
        while schedule.ready(shape):
            job = schedule.take(shape)
            schedule.started(job, now)
            taken.append(job)
    return taken


def test_children_wait_for_every_parent():
    schedule = fresh([Task(1), Task(2), Task(3, (1, 2))])
    assert take_all(schedule) == [1, 2]
    assert schedule.ended(1, Cause.DONE, 0).moves == []
    assert schedule.ended(2, Cause.DONE, 0).moves == [Move(3, JobState.QUEUED)]
    assert take_all(schedule) == [3]


def test_ready_jobs_run_in_the_order_of_the_workflow():
    schedule = fresh([Task(job) for job in (7, 3, 9, 1)])
    assert take_all(schedule) == [7, 3, 9, 1]


def test_a_retry_waits_for_its_back_off_and_the_budget_ends():
    schedule = fresh([Task(1, retries={Cause.NODE_LOST: 1})], delay=lambda cause, count: 10.0)
    take_all(schedule)
    assert schedule.ended(1, Cause.NODE_LOST, 100.0).state is JobState.QUEUED
    schedule.wake(109.9)
    assert schedule.shapes() == []
    assert schedule.next_timer() == 110.0
    schedule.wake(110.0)
    assert take_all(schedule, 110.0) == [1]
    assert schedule.attempt(1) == 2
    assert schedule.ended(1, Cause.NODE_LOST, 120.0).state is JobState.FAILED
    assert schedule.finished


def test_budgets_are_counted_by_cause():
    retries = {Cause.NODE_LOST: 1, Cause.OUT_OF_MEMORY: 1}
    schedule = fresh([Task(1, retries=retries)], delay=lambda cause, count: 0.0)
    for cause in (Cause.NODE_LOST, Cause.OUT_OF_MEMORY):
        schedule.wake(0.0)
        take_all(schedule)
        assert schedule.ended(1, cause, 0.0).state is JobState.QUEUED


@pytest.mark.parametrize("cause", [Cause.USER_ERROR, Cause.DIVERGED, Cause.TIMED_OUT])
def test_what_would_fail_again_is_not_retried(cause):
    schedule = fresh([Task(1, retries={Cause.NODE_LOST: 3}), Task(2, (1,)), Task(3, (2,))])
    take_all(schedule)
    verdict = schedule.ended(1, cause, 0.0)
    assert verdict.state is JobState.FAILED
    assert verdict.moves == [Move(2, JobState.SKIPPED), Move(3, JobState.SKIPPED)]
    assert schedule.finished


def test_a_failure_leaves_unrelated_jobs_alone():
    schedule = fresh([Task(1), Task(2), Task(3, (2,))])
    take_all(schedule)
    schedule.ended(1, Cause.USER_ERROR, 0.0)
    assert schedule.ended(2, Cause.DONE, 0.0).moves == [Move(3, JobState.QUEUED)]


def test_a_stopped_attempt_costs_no_retry():
    schedule = fresh([Task(1)])
    take_all(schedule)
    schedule.stop()
    assert schedule.ended(1, Cause.STOPPED, 0.0).state is JobState.QUEUED
    assert schedule.finished
    assert schedule.shapes() == []


def test_cancel_lets_nothing_run_again():
    schedule = fresh([Task(1), Task(2, (1,)), Task(3)])
    schedule.started(schedule.take(ONE), 0.0)
    assert schedule.cancel() == [Move(2, JobState.CANCELLED), Move(3, JobState.CANCELLED)]
    assert not schedule.finished
    assert schedule.ended(1, Cause.STOPPED, 0.0).state is JobState.CANCELLED
    assert schedule.finished


def test_a_time_out_is_told_once_and_only_of_the_attempt_it_was_set_for():
    schedule = fresh([Task(1, timeout=5.0, retries={Cause.NODE_LOST: 1})], delay=lambda *_: 0.0)
    take_all(schedule, 0.0)
    schedule.ended(1, Cause.NODE_LOST, 3.0)
    schedule.wake(3.0)
    take_all(schedule, 3.0)
    assert schedule.overdue(5.0) == []
    assert schedule.overdue(8.0) == [1]
    assert schedule.overdue(9.0) == []


@pytest.mark.parametrize(
    ("stored", "moves"),
    [
        (JobState.DONE, []),
        (JobState.RUNNING, []),
        (JobState.QUEUED, []),
        (JobState.WAITING, [JobState.QUEUED]),
        (JobState.FAILED, [JobState.QUEUED]),
        (JobState.SKIPPED, [JobState.WAITING, JobState.QUEUED]),
        (JobState.CANCELLED, [JobState.WAITING, JobState.QUEUED]),
    ],
)
def test_every_state_can_be_resumed(stored, moves):
    assert Schedule([Task(1)]).begin({1: (stored, 1)}) == [Move(1, state) for state in moves]


def test_a_reused_job_lets_its_children_run():
    schedule = fresh([Task(1), Task(2, (1,))])
    assert schedule.reuse(1) == [Move(2, JobState.QUEUED)]
    assert take_all(schedule) == [2]


def test_back_off_grows_and_is_bounded():
    waits = [backoff(Cause.NODE_LOST, count) for count in range(1, 12)]
    assert waits == sorted(waits)
    assert waits[-1] == 60.0


@st.composite
def workflows(draw):
    size = draw(st.integers(1, 12))
    return [
        Task(
            job,
            tuple(draw(st.sets(st.integers(0, job - 1), max_size=3))) if job else (),
            Resources(cpus=draw(st.integers(1, 2))),
            {Cause.NODE_LOST: draw(st.integers(0, 2))},
        )
        for job in range(size)
    ]


@settings(deadline=None, max_examples=150)
@given(workflows(), st.data())
def test_whatever_happens_every_job_ends_by_legal_moves(tasks, data):
    schedule = Schedule(tasks, delay=lambda cause, count: 1.0)
    states = dict.fromkeys(range(len(tasks)), JobState.WAITING)

    def follow(moves):
        for job, state in moves:
            assert state in MOVES[states[job]]
            states[job] = state

    follow(schedule.begin({task.id: (JobState.WAITING, 0) for task in tasks}))
    now, running = 0.0, []
    for _ in range(400):
        if schedule.finished:
            break
        now += 1.0
        schedule.wake(now)
        for job in take_all(schedule, now):
            assert all(states[need] is JobState.DONE for need in tasks[job].needs)
            follow([Move(job, JobState.RUNNING)])
            running.append(job)
        if running:
            job = running.pop(data.draw(st.integers(0, len(running) - 1)))
            cause = data.draw(st.sampled_from([Cause.DONE, Cause.NODE_LOST, Cause.USER_ERROR]))
            verdict = schedule.ended(job, cause, now)
            follow([Move(job, verdict.state), *verdict.moves])
    assert schedule.finished
    assert all(schedule.state(job) is state for job, state in states.items())
    for task in tasks:
        dead = any(states[need] in (JobState.FAILED, JobState.SKIPPED) for need in task.needs)
        assert (states[task.id] is JobState.SKIPPED) == dead


def test_an_event_costs_no_more_with_ten_thousand_jobs_queued():
    def median_event(queued):
        schedule = fresh([Task(job) for job in range(queued)])
        times = []
        for _ in range(99):
            began = perf_counter()
            job = schedule.take(ONE)
            schedule.started(job, 0.0)
            schedule.ended(job, Cause.DONE, 0.0)
            times.append(perf_counter() - began)
        return sorted(times)[49]

    many = median_event(10_000)
    assert many < 0.010
    assert many < 20 * median_event(100)
