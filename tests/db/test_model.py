"""The store against a model of a few lines: any order of operations, by two controllers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlab.db.errors import Held, IllegalMove, LeaseLost
from kvlab.db.rows import Lease, NewJob
from kvlab.db.states import MOVES, Cause, JobState, WorkflowState
from kvlab.db.store import Store

NAMES = ("a", "b")
TTL = 10.0
jobs = st.sampled_from(NAMES)
steps = st.integers(0, 5)
owners = st.sampled_from(["one", "two"])
ENDS = {
    Cause.DONE: JobState.DONE,
    Cause.NODE_LOST: JobState.QUEUED,
    Cause.DIVERGED: JobState.FAILED,
    Cause.CANCELLED: JobState.CANCELLED,
}


@dataclass
class Job:
    state: JobState = JobState.QUEUED
    attempt: int = 0
    checkpoint: tuple[int, int] | None = None
    points: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict)
    causes: list[Cause | None] = field(default_factory=list)


class Model(RuleBasedStateMachine):
    """Each controller keeps the last lease it got, live or lost; the store must tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{self.folder.name}/kvlab.db"
        self.store = Store.open(self.url)
        new = [NewJob(n, n, "noop", {}, {}, {}, (), f"id {n}", {}) for n in NAMES]
        self.workflow = self.store.create_workflow("w", "", {}, new, 0.0)
        self.ids = {job.name: job.id for job in self.store.load(self.workflow).jobs}
        self.jobs = {name: Job() for name in NAMES}
        self.leases: dict[str, Lease] = {}
        self.holder: str | None = None
        self.until = 0.0
        self.now = 0.0
        self.value = 0.0

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def write(self, owner: str, act: Any) -> Any:
        """Run `act` in a batch of that controller: a lost lease must refuse it."""
        self.now += 0.1
        lease = self.leases[owner]
        if self.holder != owner:
            with pytest.raises(LeaseLost), self.store.batch(lease, self.now) as batch:
                act(batch)
            return None
        with self.store.batch(lease, self.now) as batch:
            return act(batch)

    @rule(owner=owners)
    def claim(self, owner: str) -> None:
        if self.holder is not None and self.now < self.until:
            with pytest.raises(Held):
                self.store.claim(self.workflow, owner, TTL, self.now)
            return
        self.leases[owner] = self.store.claim(self.workflow, owner, TTL, self.now)
        self.holder, self.until = owner, self.now + TTL

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.holder)
    @rule()
    def renew(self) -> None:
        assert self.holder is not None
        self.store.renew(self.leases[self.holder], TTL, self.now)
        self.until = self.now + TTL

    @precondition(lambda self: self.holder)
    @rule()
    def release(self) -> None:
        assert self.holder is not None
        self.store.release(self.leases[self.holder], WorkflowState.STOPPED, self.now)
        self.holder = None

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = Store.open(self.url)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), name=jobs)
    def start(self, data: st.DataObject, name: str) -> None:
        owner = data.draw(st.sampled_from(sorted(self.leases)))
        job = self.jobs[name]
        if self.holder == owner and job.state is not JobState.QUEUED:
            with pytest.raises(IllegalMove):
                self.write(owner, lambda batch: batch.start(self.ids[name], owner))
            return
        number = self.write(owner, lambda batch: batch.start(self.ids[name], owner))
        if number is not None:
            job.attempt += 1
            job.state = JobState.RUNNING
            job.causes.append(None)
            assert number == job.attempt

    @precondition(lambda self: any(job.attempt for job in self.jobs.values()))
    @rule(data=st.data(), cause=st.sampled_from(list(ENDS)))
    def end(self, data: st.DataObject, cause: Cause) -> None:
        name, number, owner = self.attempt(data)
        job = self.jobs[name]
        result = {"n": number} if cause is Cause.DONE else None
        ended = self.write(
            owner,
            lambda batch: batch.end(self.ids[name], number, cause, ENDS[cause], result=result),
        )
        if ended is not None:
            assert ended == (number == job.attempt and job.state is JobState.RUNNING)
        if ended:
            job.state = ENDS[cause]
            job.causes[-1] = cause

    @precondition(lambda self: any(job.attempt for job in self.jobs.values()))
    @rule(data=st.data(), keys=st.sets(st.sampled_from(["x", "y"]), min_size=1), first=steps)
    def points(self, data: st.DataObject, keys: set[str], first: int) -> None:
        name, number, owner = self.attempt(data)
        self.value += 1
        job = self.jobs[name]
        rows = [(key, step, self.value, 1) for key in sorted(keys) for step in (first, first + 1)]
        taken = self.write(owner, lambda batch: batch.points(self.ids[name], number, rows))
        if taken is not None:
            assert taken == (len(rows) if number == job.attempt else 0)
        if taken:
            job.points.update({(key, step): (value, number) for key, step, value, _ in rows})

    @precondition(lambda self: any(job.attempt for job in self.jobs.values()))
    @rule(data=st.data(), step=steps)
    def checkpoint(self, data: st.DataObject, step: int) -> None:
        name, number, owner = self.attempt(data)
        job = self.jobs[name]
        taken = self.write(
            owner, lambda batch: batch.checkpoint(self.ids[name], number, step, "file:///x")
        )
        if taken is not None:
            assert taken == (number == job.attempt and job.state is JobState.RUNNING)
        if taken:
            job.checkpoint = (step, number)

    @precondition(lambda self: any(job.attempt for job in self.jobs.values()))
    @rule(data=st.data(), step=st.none() | steps)
    def rewind(self, data: st.DataObject, step: int | None) -> None:
        name, number, owner = self.attempt(data)
        job = self.jobs[name]
        taken = self.write(owner, lambda batch: batch.rewind(self.ids[name], number, step))
        if taken is not None:
            assert taken == (number == job.attempt)
        if taken:
            floor = -1 if step is None else step
            job.points = {
                (key, at): (value, attempt)
                for (key, at), (value, attempt) in job.points.items()
                if at <= floor or attempt == number
            }
            if job.checkpoint and job.checkpoint[1] < number and job.checkpoint[0] > floor:
                job.checkpoint = None

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), name=jobs, state=st.sampled_from(list(JobState)))
    def move(self, data: st.DataObject, name: str, state: JobState) -> None:
        owner = data.draw(st.sampled_from(sorted(self.leases)))
        job = self.jobs[name]
        legal = state in MOVES[job.state] and JobState.RUNNING not in (state, job.state)
        if self.holder == owner and not legal:
            with pytest.raises(IllegalMove):
                self.write(owner, lambda batch: batch.move(self.ids[name], state))
            return
        self.write(owner, lambda batch: batch.move(self.ids[name], state))
        if self.holder == owner:
            job.state = state

    def attempt(self, data: st.DataObject) -> tuple[str, int, str]:
        """Any attempt there has been, reported by any controller there has been."""
        name = data.draw(st.sampled_from([n for n, job in self.jobs.items() if job.attempt]))
        number = data.draw(st.integers(1, self.jobs[name].attempt))
        return name, number, data.draw(st.sampled_from(sorted(self.leases)))

    @invariant()
    def the_store_agrees(self) -> None:
        workflow = self.store.load(self.workflow)
        assert workflow.row.owner == self.holder
        for row in workflow.jobs:
            job = self.jobs[row.name]
            assert (row.state, row.attempt) == (job.state, job.attempt)
            assert [attempt.cause for attempt in row.attempts] == job.causes
            held = row.checkpoint
            assert (held and (held.step, held.attempt)) == job.checkpoint
            stored = {(p.key, p.step): (p.value, p.attempt) for p in self.store.points(row.id)}
            assert stored == job.points


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
