"""The controller owns one workflow's graph; it stores every change of state before acting on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from kvlab import KvlabError
from kvlab.db.batches import Batch
from kvlab.db.rows import FinishedJob, Lease, Workflow
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller.adoption import Adoption
from kvlab.platform.controller.attempts import STARTS, Attempts
from kvlab.platform.controller.inbox import (
    Asked,
    LeaseOver,
    Lost,
    Message,
    TakenBack,
    Told,
    Up,
)
from kvlab.platform.controller.jobs import Jobs, usable
from kvlab.platform.controller.lease import Heartbeat, claim
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.controller.leftovers import clear
from kvlab.platform.controller.pool import Pool
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.controller.slots import check_fit
from kvlab.platform.controller.snapshot import RunningJob, Snapshot
from kvlab.platform.controller.studies import KIND, Studies
from kvlab.platform.graph import Resources
from kvlab.platform.home import Home
from kvlab.platform.record import fault
from kvlab.platform.record.feed import Feed, MakeMirror

STOP_SECONDS = 30.0
"""How long jobs have to checkpoint after a request to stop."""

OTHERS_SECONDS = 0.2

NODES_SECONDS = 10.0
"""How often a cluster is asked which nodes it has."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `Controller.run` ended. `mirror`: what MLflow still lacks, as one line, or None."""

    workflow: int
    state: WorkflowState
    counts: Mapping[JobState, int]
    mirror: str | None = None


class Controller:
    """Runs one workflow that is stored, from wherever it stands, until nothing is left to run.

    The same class serves a driver on one machine and the detached actor of a cluster; Ray is up.

    Args:
        detached: workers outlive this process; those of an earlier controller are looked for.
        pool: workers to use and leave running; None: its own, ended with it.
        mirror: makes the handle of the MLflow mirror actor; None: nothing is mirrored.

    Raises (run):
        Held: a live controller has the workflow. KvlabError: a job asks for more than any node has.
        LeaseLost: another controller took over; workers are left alone.
    """

    def __init__(
        self,
        home: Home,
        store: Store,
        workflow: int,
        *,
        detached: bool = False,
        pool: Pool | None = None,
        mirror: MakeMirror | None = None,
    ) -> None:
        self._home = home
        self._store = store
        self._workflow = workflow
        self._detached = detached
        self._mirror = mirror
        self._own_pool = pool is None and not detached
        self._pool = pool or Pool(home, detached=detached)
        self._inbox = self._pool.inbox
        self._slots = self._pool.slots
        self._schedule = Schedule([])
        self._jobs = Jobs([])
        self._stop_by: float | None = None
        self._nodes_at = 0.0
        self._cancelled = False
        self._attempts: Attempts | None = None
        self._studies: Studies | None = None

    def stop(self) -> None:
        """Let running jobs checkpoint, then end; asked twice: end now. Any thread, any time."""
        self._inbox.put(Asked("stop"))

    def cancel(self) -> None:
        """End every job now; the workflow ends as cancelled."""
        self._inbox.put(Asked("cancel"))

    def snapshot(self, after: int = 0) -> Snapshot:
        """How things stand, with the changes from number `after` on. Any thread."""
        held = [] if self._attempts is None else list(self._attempts.running.values())
        running = [one for one in held if not one.waits]
        # To a person, what a worker has in its queue does not run yet.
        counts = Counter(self._schedule.counts)
        counts[JobState.RUNNING] -= len(held) - len(running)
        counts[JobState.QUEUED] += len(held) - len(running)
        return Snapshot(
            self._workflow,
            counts,
            tuple(
                RunningJob(self._jobs[one.tail.job].name, one.tail.attempt, one.since, one.progress)
                for one in running
            ),
            tuple(self._jobs.history[after:]),
            () if self._studies is None else self._studies.views(),
        )

    def run(self) -> Outcome:
        """Claim the workflow, run it to its end, release it."""
        lease = claim(self._store, self._workflow)
        heartbeat = Heartbeat(self._store, lease, self._inbox)
        try:
            return self._hold(lease)
        finally:
            heartbeat.close()
            if self._own_pool:
                self._pool.close()

    def _hold(self, lease: Lease) -> Outcome:
        stored = self._store.load(self._workflow)
        self._jobs = Jobs(stored.jobs)
        self._schedule = Schedule(self._jobs.tasks())
        self._ledger = Ledger(self._store, lease)
        self._attempts = attempts = Attempts(
            self._home,
            self._workflow,
            self._jobs,
            self._schedule,
            self._slots,
            self._pool,
            self._ledger,
        )
        self._feed = Feed(self._store, stored, self._jobs, self._mirror)
        self._studies = studies = Studies(
            self._home,
            self._store,
            self._workflow,
            self._jobs,
            self._schedule,
            attempts,
            self._ledger,
            lambda job, found, now: self._reuse(job, found, attempts, now),
        )
        try:
            self._open(stored, attempts, studies)
            while not self._schedule.finished:
                self._tick(attempts, studies, self._listen(self._patience(attempts, studies)))
            return self._close(lease, studies)
        finally:
            studies.close()
            self._feed.close()

    def _open(self, stored: Workflow, attempts: Attempts, studies: Studies) -> None:
        """Rebuild from SQL: get jobs under way, take over what ran, reuse what is finished."""
        now = time.time()
        rows = self._jobs.rows.values()
        unfinished = (row for row in rows if row.state is not JobState.DONE)
        check_fit(((row.name, Resources(**row.resources)) for row in unfinished), self._slots)
        states = {row.id: (row.state, row.attempt) for row in rows}
        attempts.moved(self._schedule.begin(states, studies.settled()))
        studies.interrupted(now)
        clear(self._home, rows)
        open_jobs = [row.id for row in rows if self._schedule.state(row.id) is not JobState.DONE]
        running = [job for job in open_jobs if self._schedule.state(job) is JobState.RUNNING]
        adoption = Adoption(
            self._home,
            self._jobs,
            self._schedule,
            self._slots,
            self._pool,
            attempts,
            live=self._detached,
        )
        for job in running:
            adoption.adopt(job, now)
        if self._detached:
            self._pool.sweep()
        finished = self._store.finished({self._jobs[job].identity for job in open_jobs})
        for job in open_jobs:
            found = finished.get(self._jobs[job].identity)
            if found is not None and job not in running and usable(found):
                self._reuse(job, found, attempts, now)
        self._feed.begin()
        self._tick(attempts, studies, [])

    def _reuse(self, job: int, found: FinishedJob, attempts: Attempts, now: float) -> None:
        if self._jobs[job].kind == KIND and self._studies and not self._studies.takes(job, found):
            return

        def write(batch: Batch) -> None:
            batch.reuse(job, found)

        self._ledger.row(write, job, "end")
        self._jobs.artifacts[job] = found.artifact_uri
        self._jobs.note(
            job, 0, JobState.DONE, ended_at=now, result=found.result, reused_from=found.job_id
        )
        attempts.moved(self._schedule.reuse(job))

    def _echo(self, attempts: Attempts, now: float) -> None:
        """Jobs whose twin is done are done with its result, where that may be."""
        while echoes := self._schedule.echoes():
            for job, twin in echoes:
                found = self._jobs.finished(twin, self._workflow)
                if found is not None and usable(found):
                    self._reuse(job, found, attempts, now)
                else:
                    self._schedule.alone(job)

    def _tick(self, attempts: Attempts, studies: Studies, messages: list[Message]) -> None:
        """Hear, decide, store, act."""
        now = time.time()
        for message in messages:
            self._hear(attempts, studies, message, now)
        self._schedule.wake(now)
        attempts.settle(now)
        self._echo(attempts, now)
        studies.tick(now)
        if self._stop_by is not None and now >= self._stop_by:
            attempts.end_all(Cause.STOPPED, now)  # did not stop in time
        if attempts.failed_starts >= STARTS:
            raise KvlabError(f"workers cannot be started: {attempts.start_error}")
        if self._detached and now >= self._nodes_at:
            self._nodes_at = now + NODES_SECONDS
            self._slots.set_nodes(self._pool.nodes())
        attempts.dispatch(now)
        for slot in self._slots.expire(now):
            self._ledger.then(partial(self._pool.kill, slot))
        for mark in self._feed.marks():
            self._ledger.row(mark)
        self._ledger.commit(now)
        self._feed.hold_back(attempts.measuring > 0)
        self._feed.offer()
        attempts.poll(now)

    def _hear(self, attempts: Attempts, studies: Studies, message: Message, now: float) -> None:
        match message:
            case Told():
                attempts.told(message, now)
            case Up():
                attempts.up(message, now)
            case Lost():
                attempts.lost(message, now)
            case TakenBack():
                attempts.taken_back(message, now)
            case Asked(what="cancel"):
                self._cancel(attempts, studies, now)
            case Asked():
                self._stop(attempts, studies, now)
            case LeaseOver():
                raise message.error

    def _stop(self, attempts: Attempts, studies: Studies, now: float) -> None:
        if self._stop_by is not None:
            self._stop_by = now
            return
        self._stop_by = now + STOP_SECONDS
        self._schedule.stop()
        studies.end_all(Cause.STOPPED, now)
        attempts.stop()

    def _cancel(self, attempts: Attempts, studies: Studies, now: float) -> None:
        self._cancelled = True
        attempts.moved(self._schedule.cancel())
        studies.end_all(Cause.CANCELLED, now)
        attempts.end_all(Cause.CANCELLED, now)

    def _listen(self, seconds: float) -> list[Message]:
        """Wait for a message; what comes from elsewhere than workers may take `OTHERS_SECONDS`."""
        if not self._pool.expecting:
            return self._inbox.get(seconds)
        heard = self._inbox.get(0.0)
        if not heard:
            self._pool.hear(min(seconds, OTHERS_SECONDS), self._slots.ahead // 2)
            heard = self._inbox.get(0.0)
        return heard

    def _patience(self, attempts: Attempts, studies: Studies) -> float:
        """Seconds until something is due."""
        if self._ledger.waiting or self._schedule.restless:
            return 0.0
        now = time.time()
        timers = [attempts.next_poll(), self._schedule.next_timer(), self._stop_by]
        timers.append(studies.due(now))
        due = min((timer for timer in timers if timer is not None), default=float("inf"))
        return min(1.0, max(0.0, due - now))

    def _close(self, lease: Lease, studies: Studies) -> Outcome:
        """Bring the mirror up to date as far as it answers, and release the workflow."""
        state = self._end_state(studies)
        now = time.time()
        self._feed.finish(state, now)
        for mark in self._feed.marks():
            self._ledger.row(mark)
        self._ledger.commit(now)
        fault.point("finish.before_commit")
        self._store.release(lease, state, now)
        fault.point("finish.after_commit")
        counts = {one: count for one, count in self._schedule.counts.items() if count}
        return Outcome(self._workflow, state, counts, self._feed.behind())

    def _end_state(self, studies: Studies) -> WorkflowState:
        if self._cancelled:
            return WorkflowState.CANCELLED
        # A trial may fail: its study goes on, and says so.
        own = self._jobs.rows.keys() - studies.of_trials()
        counts = Counter(self._schedule.state(job) for job in own)
        if counts[JobState.DONE] == len(own):
            return WorkflowState.DONE
        if counts[JobState.WAITING] or counts[JobState.QUEUED]:
            return WorkflowState.STOPPED
        return WorkflowState.FAILED
