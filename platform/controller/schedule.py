"""Which job may run, which may run again, and what a failure does to the rest.

Pure: no Ray, no SQL, no clock of its own. Every method is told the time and returns the changes of
state, which its caller stores before acting on them. An event costs O(log jobs) and its own
consequences, however many jobs are queued.

Of the ready jobs of one identity one runs at a time; once it is done the others are `echoes` of it.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvlab.db.states import TERMINAL, Cause, JobState
from kvlab.platform.controller.twins import Twins
from kvlab.platform.graph import Resources

ONE_CPU = Resources()


@dataclass(frozen=True, slots=True)
class Task:
    """What scheduling knows of a job.

    needs: ids of the jobs that must be done first. inline: no worker takes it, see `inline`.
    identity: jobs that share it are one piece of work; "" is shared with none.
    """

    id: int
    needs: tuple[int, ...] = ()
    resources: Resources = ONE_CPU
    retries: Mapping[Cause, int] = field(default_factory=dict)
    timeout: float | None = None
    inline: bool = False
    identity: str = ""


class Move(NamedTuple):
    """A job's change of state where no attempt begins or ends."""

    job: int
    state: JobState


class Echo(NamedTuple):
    """A ready job, and its twin that is done: its result may stand for both."""

    job: int
    twin: int


class Verdict(NamedTuple):
    """What the end of an attempt means: the job's own new state, and moves of others."""

    state: JobState
    moves: list[Move]


@dataclass(slots=True)
class _Job:
    task: Task
    order: int
    state: JobState = JobState.WAITING
    missing: int = 0
    attempt: int = 0
    failures: Counter[Cause] = field(default_factory=Counter)
    children: list[int] = field(default_factory=list)


def backoff(cause: Cause, failures: int) -> float:
    """Seconds before the next attempt after the `failures`-th failure of that cause."""
    first = 5.0 if cause is Cause.INFRASTRUCTURE else 0.5
    return float(min(first * 2 ** (failures - 1), 60.0))


class Schedule:
    """The states of a workflow's jobs.

    Args:
        tasks: parents before children, in the order in which ready jobs are to run.
        delay: see `backoff`.
    """

    def __init__(
        self, tasks: Sequence[Task], delay: Callable[[Cause, int], float] = backoff
    ) -> None:
        self._jobs: dict[int, _Job] = {}
        self._by_order: list[int] = []
        self._delay = delay
        self._inline: list[int] = []
        self._twins = Twins()
        self._echoes: list[Echo] = []
        self._ready: dict[Resources, list[int]] = defaultdict(list)
        self._delayed: list[tuple[float, int]] = []
        self._deadlines: list[tuple[float, int, int]] = []
        self._stopping = self._cancelled = False
        self.counts: Counter[JobState] = Counter()
        for task in tasks:
            self._know(task)
        for task in tasks:
            self._follow(task)

    def begin(
        self, stored: Mapping[int, tuple[JobState, int]], settled: Container[int] = ()
    ) -> list[Move]:
        """Take over what is stored (job -> state, newest attempt) and get every job under way.

        DONE and RUNNING jobs stay. Failed, skipped and cancelled ones have another chance, with
        full retry budgets, unless they are `settled`.
        """
        moves: list[Move] = []
        for begun in (JobState.RUNNING, JobState.DONE):  # it leads whoever comes before it
            for job in self._jobs.values():
                if stored[job.task.id][0] is begun:
                    self._twins.claim(job.task.identity, job.task.id)
        for job in self._jobs.values():
            before, job.attempt = stored[job.task.id]
            over = job.task.id in settled and before in TERMINAL
            moves += self._enter(job, before, over or before in (JobState.DONE, JobState.RUNNING))
        return moves

    def add(self, tasks: Sequence[Task], state: Mapping[int, JobState]) -> list[Move]:
        """Take in jobs that came later, parents before children, as they are stored."""
        moves: list[Move] = []
        for task in tasks:
            self._know(task)
            self._follow(task)
            moves += self._enter(self._jobs[task.id], state[task.id], stays=False)
        return moves

    def inline(self) -> list[int]:
        """Remove and return the ready jobs that the controller does itself."""
        if self._stopping:
            return []
        found, self._inline = self._inline, []
        return found

    def resolved(self, task: Task) -> None:
        """What a job is has been found: it is no inline one any more."""
        one = self._jobs[task.id]
        one.task = task
        if one.state is JobState.QUEUED:
            self._push(one)

    def echoes(self) -> list[Echo]:
        """Remove and return the ready jobs whose twin is done: for `reuse`, else `alone`."""
        found, self._echoes = self._echoes, []
        return [echo for echo in found if self._jobs[echo.job].state is JobState.QUEUED]

    def alone(self, job: int) -> None:
        """The result of a job's twin is of no use to it: it runs itself, or behind another twin."""
        one = self._jobs[job]
        identity = one.task.identity
        if self._jobs[self._twins.claim(identity, job)].state is JobState.DONE:
            self._twins.hand_over(identity, job)
        self._push(one)

    @property
    def restless(self) -> bool:
        """Whether `inline` or `echoes` would return something."""
        return bool(self._echoes) or bool(self._inline and not self._stopping)

    def state(self, job: int) -> JobState:
        return self._jobs[job].state

    def attempt(self, job: int) -> int:
        """The number of the job's newest attempt, 0 before the first."""
        return self._jobs[job].attempt

    def task(self, job: int) -> Task:
        return self._jobs[job].task

    @property
    def finished(self) -> bool:
        """Nothing runs, and nothing will."""
        if self._stopping:
            return not self.counts[JobState.RUNNING]
        return sum(self.counts[state] for state in TERMINAL) == len(self._jobs)

    def shapes(self) -> list[Resources]:
        """The shapes that ready jobs want, that of the first job first."""
        if self._stopping:
            return []
        return sorted((s for s, queue in self._ready.items() if queue), key=self._head)

    def ready(self, shape: Resources) -> int:
        """How many ready jobs want `shape`."""
        return len(self._ready[shape])

    def take(self, shape: Resources) -> int:
        """Remove and return the first ready job that wants `shape`."""
        return self._by_order[heapq.heappop(self._ready[shape])]

    def started(self, job: int, now: float) -> int:
        """The job's next attempt begins; return its number."""
        one = self._jobs[job]
        self._set(one, JobState.RUNNING)
        one.attempt += 1
        self.watch(job, now)
        return one.attempt

    def watch(self, job: int, since: float) -> None:
        """Hold the running attempt, begun at `since`, to the job's time-out."""
        one = self._jobs[job]
        if one.task.timeout is not None:
            heapq.heappush(self._deadlines, (since + one.task.timeout, job, one.attempt))

    def ended(self, job: int, cause: Cause, now: float) -> Verdict:
        """The running attempt of `job` ended."""
        one = self._jobs[job]
        if cause is Cause.DONE:
            self._set(one, JobState.DONE)
            self._over(one)
            return Verdict(JobState.DONE, self._release(one))
        if cause is Cause.CANCELLED or self._cancelled:
            self._set(one, JobState.CANCELLED)
            self._over(one)
            return Verdict(JobState.CANCELLED, self._skip(one))
        if cause is Cause.STOPPED:
            self._set(one, JobState.QUEUED)
            self._push(one)
            return Verdict(JobState.QUEUED, [])
        one.failures[cause] += 1
        if one.failures[cause] <= one.task.retries.get(cause, 0):
            self._set(one, JobState.QUEUED)
            due = now + self._delay(cause, one.failures[cause])
            heapq.heappush(self._delayed, (due, job))
            return Verdict(JobState.QUEUED, [])
        self._set(one, JobState.FAILED)
        self._over(one)
        return Verdict(JobState.FAILED, self._skip(one))

    def reuse(self, job: int) -> list[Move]:
        """The job, not begun yet, is done with a result from elsewhere."""
        one = self._jobs[job]
        self._unqueue(one)
        self._set(one, JobState.DONE)
        self._over(one)
        return self._release(one)

    def withdraw(self, job: int) -> list[Move]:
        """A job that has not begun never will."""
        one = self._jobs[job]
        if one.state not in (JobState.WAITING, JobState.QUEUED):
            return []
        self._unqueue(one)
        self._set(one, JobState.CANCELLED)
        self._over(one)
        return [Move(job, JobState.CANCELLED), *self._skip(one)]

    def wake(self, now: float) -> None:
        """Let jobs whose back-off is over run again."""
        while self._delayed and self._delayed[0][0] <= now:
            one = self._jobs[heapq.heappop(self._delayed)[1]]
            if one.state is JobState.QUEUED:
                self._push(one)

    def overdue(self, now: float) -> list[int]:
        """Return running jobs that passed their time-out; each is told once."""
        late: list[int] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, job, attempt = heapq.heappop(self._deadlines)
            one = self._jobs[job]
            if one.state is JobState.RUNNING and one.attempt == attempt:
                late.append(job)
        return late

    def next_timer(self) -> float | None:
        """When `wake` or `overdue` will next have something to do."""
        timers = [queue[0][0] for queue in (self._delayed, self._deadlines) if queue]
        return min(timers, default=None)

    def stop(self) -> None:
        """Let nothing begin any more."""
        self._stopping = True

    def cancel(self) -> list[Move]:
        """Cancel all that has not begun; running jobs are cancelled when their attempts end."""
        self._cancelled = True
        moves = []
        for job, one in self._jobs.items():
            if one.state in (JobState.WAITING, JobState.QUEUED):
                self._set(one, JobState.CANCELLED)
                moves.append(Move(job, JobState.CANCELLED))
        self._ready.clear()
        self._inline.clear()
        self._delayed.clear()
        self._twins.clear()
        self._echoes.clear()
        return moves

    def _set(self, job: _Job, state: JobState) -> None:
        self.counts[job.state] -= 1
        self.counts[state] += 1
        job.state = state

    def _know(self, task: Task) -> None:
        self._jobs[task.id] = _Job(task, len(self._by_order))
        self._by_order.append(task.id)

    def _follow(self, task: Task) -> None:
        for need in task.needs:
            self._jobs[need].children.append(task.id)

    def _enter(self, job: _Job, before: JobState, stays: bool) -> Iterable[Move]:
        """A job as it is stored joins the others; where it does not stay, on the way to run."""
        job.missing = sum(self._jobs[need].state is not JobState.DONE for need in job.task.needs)
        job.state = before
        if not stays:
            job.state = JobState.QUEUED if job.missing == 0 else JobState.WAITING
        if job.state is JobState.QUEUED:
            self._push(job)
        self.counts[job.state] += 1
        return () if stays else _path(job.task.id, before, job.state)

    def _push(self, job: _Job) -> None:
        """A job is ready: it may begin, unless a twin of it has."""
        task = job.task
        leader = self._twins.claim(task.identity, task.id)
        if leader != task.id:
            if self._jobs[leader].state is JobState.DONE:
                self._echoes.append(Echo(task.id, leader))
            else:
                self._twins.wait(task.identity, task.id)
        elif task.inline:
            self._inline.append(task.id)
        else:
            heapq.heappush(self._ready[task.resources], job.order)

    def _over(self, job: _Job) -> None:
        """A job has ended: its twins are done with it too, or the next of them begins."""
        identity = job.task.identity
        done = job.state is JobState.DONE
        if done:
            self._twins.claim(identity, job.task.id)
        if not identity or not self._twins.leads(identity, job.task.id):
            return
        if not done:
            self._twins.give_up(identity)
        while (twin := self._twins.next(identity)) is not None:
            if self._jobs[twin].state is not JobState.QUEUED:
                continue
            self._push(self._jobs[twin])
            if not done:
                return

    def _unqueue(self, job: _Job) -> None:
        """Take a job out of those that are ready, if it is one."""
        if job.state is not JobState.QUEUED:
            return
        if not self._twins.leads(job.task.identity, job.task.id):
            return
        if job.task.id in self._inline:
            self._inline.remove(job.task.id)
        queue = self._ready[job.task.resources]
        if job.order in queue:
            queue.remove(job.order)
            heapq.heapify(queue)

    def _head(self, shape: Resources) -> int:
        return self._ready[shape][0]

    def _release(self, done: _Job) -> list[Move]:
        moves = []
        for child in done.children:
            one = self._jobs[child]
            one.missing -= 1
            if one.missing == 0 and one.state is JobState.WAITING:
                self._set(one, JobState.QUEUED)
                self._push(one)
                moves.append(Move(child, JobState.QUEUED))
        return moves

    def _skip(self, ended: _Job) -> list[Move]:
        moves: list[Move] = []
        below = list(ended.children)
        while below:
            one = self._jobs[below.pop()]
            if one.state is JobState.WAITING:
                self._set(one, JobState.SKIPPED)
                moves.append(Move(one.task.id, JobState.SKIPPED))
                below += one.children
        return moves


def _path(job: int, before: JobState, after: JobState) -> Iterable[Move]:
    """The legal moves from one state to another: skipped and cancelled jobs wait first."""
    if before in (JobState.SKIPPED, JobState.CANCELLED):
        yield Move(job, JobState.WAITING)
        before = JobState.WAITING
    if before is not after:
        yield Move(job, after)
