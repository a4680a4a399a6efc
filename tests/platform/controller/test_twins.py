"""Jobs of one identity in one workflow: one runs, the others wait for it and take its result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.db.states import MOVES, Cause, JobState, WorkflowState
from kvlab.platform.controller import controller
from kvlab.platform.controller.schedule import Echo, Move, Schedule, Task
from kvlab.platform.graph import Resources

DRIVE = Path(__file__).with_name("drive.py")
ONE = Resources()


def fresh(tasks, **states):
    schedule = Schedule(tasks)
    schedule.begin({task.id: (states.get(f"_{task.id}", JobState.WAITING), 0) for task in tasks})
    return schedule


def begin(schedule):
    """Start all that may; return it."""
    taken = [schedule.take(ONE) for _ in range(schedule.ready(ONE))]
    for job in taken:
        schedule.started(job, 0.0)
    return taken


def same(*jobs, needs=()):
    return [Task(job, needs, identity="same") for job in jobs]


def test_the_first_of_them_runs_and_the_others_echo_it():
    schedule = fresh(same(1, 2, 3))
    assert begin(schedule) == [1]
    schedule.ended(1, Cause.DONE, 0.0)
    assert begin(schedule) == []
    assert schedule.echoes() == [Echo(2, 1), Echo(3, 1)]
    assert schedule.echoes() == []
    schedule.reuse(2)
    schedule.reuse(3)
    assert schedule.finished


def test_what_no_identity_is_said_of_has_no_twins():
    assert begin(fresh([Task(1), Task(2)])) == [1, 2]


@pytest.mark.parametrize("cause", [Cause.USER_ERROR, Cause.CANCELLED])
def test_after_an_end_without_a_result_the_next_runs(cause):
    schedule = fresh([*same(1, 2, 3), Task(4, (2,))])
    begin(schedule)
    schedule.ended(1, cause, 0.0)
    assert begin(schedule) == [2]
    assert schedule.ended(2, Cause.DONE, 0.0).moves == [Move(4, JobState.QUEUED)]
    assert schedule.echoes() == [Echo(3, 2)]


def test_a_retry_keeps_its_twin_waiting():
    first = Task(1, retries={Cause.NODE_LOST: 1}, identity="same")
    schedule = fresh([first, *same(2)])
    begin(schedule)
    schedule.ended(1, Cause.NODE_LOST, 0.0)
    assert begin(schedule) == []
    schedule.wake(100.0)
    assert begin(schedule) == [1]


def test_one_that_is_withdrawn_holds_up_nobody():
    schedule = fresh(same(1, 2, 3))
    schedule.withdraw(2)
    schedule.withdraw(1)
    assert begin(schedule) == [3]


def test_one_that_is_ready_later_echoes_what_is_done():
    schedule = fresh([*same(1), Task(2), *same(3, needs=(2,))])
    begin(schedule)
    schedule.ended(1, Cause.DONE, 0.0)
    assert schedule.echoes() == []
    schedule.ended(2, Cause.DONE, 0.0)
    assert schedule.echoes() == [Echo(3, 1)]


def test_where_a_result_is_of_no_use_they_run_one_after_the_other():
    schedule = fresh(same(1, 2, 3))
    begin(schedule)
    schedule.ended(1, Cause.DONE, 0.0)
    for job, _ in schedule.echoes():
        schedule.alone(job)
    assert begin(schedule) == [2]
    schedule.ended(2, Cause.DONE, 0.0)
    assert schedule.echoes() == [Echo(3, 2)]


def test_one_that_ran_when_a_controller_died_is_waited_for():
    schedule = fresh(same(1, 2), _2=JobState.RUNNING)
    assert begin(schedule) == []
    schedule.ended(2, Cause.DONE, 0.0)
    assert schedule.echoes() == [Echo(1, 2)]


@st.composite
def workflows(draw):
    """Jobs of few identities; equal ones may build on different jobs, by `needs:`."""
    size = draw(st.integers(1, 12))
    return [
        Task(
            job,
            tuple(draw(st.sets(st.integers(0, job - 1), max_size=2))) if job else (),
            retries={Cause.NODE_LOST: draw(st.integers(0, 1))},
            identity=draw(st.sampled_from(["", "a", "b"])),
        )
        for job in range(size)
    ]


@settings(deadline=None, max_examples=200)
@given(workflows(), st.data())
def test_whatever_happens_every_job_ends_and_no_two_of_one_identity_run(tasks, data):
    schedule = Schedule(tasks, delay=lambda cause, count: 1.0)
    states = dict.fromkeys(range(len(tasks)), JobState.WAITING)
    running: list[int] = []

    def follow(moves):
        for job, state in moves:
            assert state in MOVES[states[job]] or state is JobState.DONE
            states[job] = state

    follow(schedule.begin({task.id: (JobState.WAITING, 0) for task in tasks}))
    for now in range(400):
        while echoes := schedule.echoes():
            for job, twin in echoes:
                assert states[twin] is JobState.DONE
                if data.draw(st.booleans()):
                    follow([Move(job, JobState.DONE), *schedule.reuse(job)])
                else:
                    schedule.alone(job)
        if schedule.finished:
            break
        schedule.wake(float(now))
        for job in begin(schedule):
            follow([Move(job, JobState.RUNNING)])
            running.append(job)
        shared = Counter(tasks[job].identity for job in running if tasks[job].identity)
        assert set(shared.values()) <= {1}
        waiting = [job for job in states if states[job] in (JobState.WAITING, JobState.QUEUED)]
        if waiting and data.draw(st.integers(0, 9)) == 0:
            follow(schedule.withdraw(data.draw(st.sampled_from(waiting))))
        if running:
            job = running.pop(data.draw(st.integers(0, len(running) - 1)))
            cause = data.draw(st.sampled_from([Cause.DONE, Cause.NODE_LOST, Cause.USER_ERROR]))
            verdict = schedule.ended(job, cause, float(now))
            follow([Move(job, verdict.state), *verdict.moves])
    assert schedule.finished
    assert all(schedule.state(job) is state for job, state in states.items())


def test_ten_thousand_twins_cost_no_more_each_than_a_hundred():
    def each(count):
        schedule = fresh(same(*range(count)))
        began = perf_counter()
        for job in range(count - 1):  # all fail, one after the other
            assert begin(schedule) == [job]
            schedule.ended(job, Cause.USER_ERROR, 0.0)
        return (perf_counter() - began) / count

    assert each(10_000) < 20 * min(each(100) for _ in range(5))


# On a real Ray and a real store.


@pytest.fixture
def twin(cell):
    """Make a cell that is the same work as all others of the same `work`."""

    def make(name, *needs, work="w", **spec):
        return replace(cell(name, *needs, **spec), identity=f"identity-of-{work}")

    return make


@pytest.mark.ray
def test_equal_jobs_of_a_workflow_run_once(run, twin, cell):
    outcome, jobs = run(
        *(twin(name, points=3, sleep=0.2, publish=True) for name in "abc"), cell("below", "b", "c")
    )
    assert outcome.state is WorkflowState.DONE
    assert {name: job.attempt for name, job in jobs.items()} == {"a": 1, "b": 0, "c": 0, "below": 1}
    for name in "bc":
        assert jobs[name].reused_from == jobs["a"].id
        assert jobs[name].result == jobs["a"].result
        assert jobs[name].artifact_uri == jobs["a"].artifact_uri
    _, again = run(twin("d", points=3), twin("e", points=3))
    assert {job.reused_from for job in again.values()} == {jobs["a"].id}


@pytest.mark.ray
def test_where_one_fails_the_next_runs(run, twin, cell):
    outcome, jobs = run(twin("a", fail="user"), twin("b", points=2), twin("c"), cell("d", "c"))
    assert outcome.state is WorkflowState.FAILED
    assert {name: job.state for name, job in jobs.items()} == {
        "a": JobState.FAILED, "b": JobState.DONE, "c": JobState.DONE, "d": JobState.DONE,
    }  # fmt: skip
    assert jobs["c"].reused_from == jobs["b"].id


@pytest.mark.ray
def test_a_result_whose_files_are_gone_is_not_taken(run, twin, monkeypatch):
    monkeypatch.setattr(controller, "usable", lambda found: False)
    outcome, jobs = run(*(twin(name, sleep=0.1) for name in "abc"))
    assert outcome.state is WorkflowState.DONE
    assert [jobs[name].attempt for name in "abc"] == [1, 1, 1]
    times = sorted((job.started_at, job.ended_at) for job in jobs.values())
    assert all(ended <= began for (_, ended), (began, _) in pairwise(times))


@pytest.mark.ray
@pytest.mark.parametrize(
    "point",
    ["start.after_commit:1", "end.before_commit:1", "end.after_commit:1", "start.after_commit:2"],
)
def test_a_killed_controller_runs_nothing_twice(
    point, cluster, home, store, submit, twin, cell, run
):
    number = submit(*(twin(name, points=3, sleep=0.3) for name in "abc"), cell("d", "b", sleep=0.1))
    command = [sys.executable, str(DRIVE), str(home.root), home.url, str(number), cluster]
    killed = subprocess.run(command, env={**os.environ, "KVLAB_FAULT": point}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    outcome, jobs = run(number)
    assert outcome.state is WorkflowState.DONE
    assert {job.state for job in jobs.values()} == {JobState.DONE}
    assert {jobs[name].reused_from for name in "bc"} == {jobs["a"].id}
    ends = [attempt.cause for job in jobs.values() for attempt in job.attempts]
    assert ends.count(Cause.DONE) == 2
