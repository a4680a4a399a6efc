"""Attempts from start to end: on which slot, what they report, and what their end changes."""

from __future__ import annotations

from functools import partial

from kvlab.db.batches import Batch
from kvlab.db.states import Cause, JobState
from kvlab.platform import artifacts
from kvlab.platform.controller.inbox import Lost, TakenBack, Told, Up
from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.controller.leftovers import forget_checkpoints
from kvlab.platform.controller.pool import Pool
from kvlab.platform.controller.running import (
    POLL_SECONDS,
    POLLS_PER_SECOND,
    WAITED,
    End,
    Running,
)
from kvlab.platform.controller.salvage import restore_point, salvage
from kvlab.platform.controller.schedule import Move, Schedule
from kvlab.platform.controller.slots import Slots, SlotState
from kvlab.platform.home import Home
from kvlab.platform.record.recorder import Tail

REUSED_AFTER = frozenset({Cause.DONE, Cause.USER_ERROR, Cause.DIVERGED, Cause.STOPPED})
"""Ends that leave a worker process fit for another job."""

QUICK_SECONDS = 0.1
"""A worker whose last job took less is given the next ones before it asks."""

RECALL_SECONDS = 0.5
"""A job that takes longer gives back what waits behind it, if another worker idles."""

START_SECONDS = 300.0
"""How long a worker may take to come up: its node may be busy, or gone without a word."""

STARTS = 5
"""Workers that may fail to start, one after another, before the workflow gives up."""


class Attempts:
    """Every method gathers rows and deeds in the ledger; nothing happens before its commit."""

    def __init__(
        self,
        home: Home,
        workflow: int,
        jobs: Jobs,
        schedule: Schedule,
        slots: Slots,
        pool: Pool,
        ledger: Ledger,
    ) -> None:
        self._home = home
        self._workflow = workflow
        self._jobs = jobs
        self._schedule = schedule
        self._slots = slots
        self._pool = pool
        self._ledger = ledger
        self._by_slot: dict[int, list[int]] = {}
        self._starting: dict[int, float] = {}  # slot -> since when
        self.running: dict[int, Running] = {}
        self.measuring = 0
        self.failed_starts = 0
        self.start_error = ""

    def dispatch(self, now: float) -> None:
        """Give ready jobs to slots; make and kill slots as the shapes ask for."""
        decision = self._slots.decide(self._schedule)
        for slot in decision.kill:
            self._ledger.then(partial(self._pool.kill, slot))
        for new in decision.create:
            self._starting[new.id] = now
            self._ledger.then(partial(self._pool.create, new))
        for job, slot in decision.run:
            self._start(job, slot, now)

    def up(self, message: Up, now: float) -> None:
        """A slot's workers are there."""
        self.failed_starts = 0
        self._starting.pop(message.slot, None)
        if message.slot in self._slots and self._slots[message.slot].state is SlotState.STARTING:
            self._slots.idle(message.slot, now)

    def told(self, message: Told, now: float) -> None:
        """A worker reported: take what is new, and the end if it came."""
        report = message.report
        running = None if report.key is None else self.running.get(report.key[0])
        if running is None or running.key != report.key or running.slot != message.slot:
            return
        if report.rank == 0:
            tail = running.tail
            tail.take(report.offset, report.data)
            running.progress = report.progress
            self._took(running, now)
            if tail.end is not None:
                running.rank_ended(0, tail.end, now)
            elif not report.running or tail.offset < report.size:
                running.poll_at = now
            elif report.hungry:
                running.poll_at = min(running.poll_at, now + POLL_SECONDS / 4)
        elif not report.running:
            other = Tail(*running.key)
            other.take(0, report.data)
            if other.end is not None:
                running.rank_ended(report.rank, other.end, now)
        self._judge(running, now)

    def lost(self, message: Lost, now: float) -> None:
        """A worker is dead. What its spools still hold counts, an end record included."""
        slot = message.slot
        self._starting.pop(slot, None)
        if slot not in self._slots:
            return
        if slot not in self._by_slot:
            if self._slots[slot].state is SlotState.STARTING:
                self.failed_starts += 1
                self.start_error = message.reason
            self._drop(slot, now)
            return
        cause = Cause.OUT_OF_MEMORY if message.memory else Cause.NODE_LOST
        end: End = {"cause": cause, "message": message.reason}
        for job in list(self._by_slot[slot]):
            running = self.running[job]
            self.read_file(running, now)
            if running.workers > 1:
                # Which rank it was does not matter: one is gone, so the attempt ends.
                running.rank_ended(-1, end, now)
                return
            if running.tail.end is None:
                # The first without an end was the one that ran; `_drop` queues the rest again.
                self.end(job, end, now, kill=True)
                return
            self.end(job, running.tail.end, now)
            if slot not in self._slots:
                return  # that end left the worker unfit, which dropped the slot
        self._drop(slot, now)

    def taken_back(self, message: TakenBack, now: float) -> None:
        """An attempt had not begun: its job is queued again."""
        job = message.key[0]
        if job in self.running and self.running[job].key == message.key:
            self.running[job].asked = True
            self.end(job, {"cause": Cause.STOPPED, "message": WAITED}, now, worked_until=0.0)

    def settle(self, now: float) -> None:
        """End gangs whose ranks had time to say why, and what ran out of its time."""
        for running in list(self.running.values()):
            if running.failing is not None:
                self._judge(running, now)
        for slot in [one for one, since in self._starting.items() if now > since + START_SECONDS]:
            self.lost(Lost(slot, f"no worker came up within {START_SECONDS:g} s"), now)
        for job in self._schedule.overdue(now):
            if job not in self.running:
                continue
            seconds = self._schedule.task(job).timeout
            late = {"cause": Cause.TIMED_OUT, "message": f"ran longer than its {seconds:g} s"}
            self.end(job, late, now, kill=True)

    def end(
        self,
        job: int,
        end: End,
        now: float,
        *,
        kill: bool = False,
        worked_until: float | None = None,
    ) -> None:
        """Store the end of a job's running attempt, and what follows from it."""
        running = self.running.pop(job)
        cause = Cause(end["cause"])
        attempt = running.tail.attempt
        message = end.get("message")
        if cause is Cause.STOPPED and not (running.asked or kill):
            cause, message = Cause.USER_ERROR, "the job stopped though nobody asked it to"
        self.measuring -= self._schedule.task(job).resources.exclusive
        verdict = self._schedule.ended(job, cause, now)
        done = verdict.state is JobState.DONE
        lost = 0.0 if done else running.lost(now if worked_until is None else worked_until)
        result, artifact = end.get("result"), end.get("artifact")

        def write(batch: Batch) -> None:
            batch.end(job, attempt, cause, verdict.state, result, artifact, message, lost)
            facts = {"cause": cause, "state": verdict.state, "lost_seconds": round(lost, 3)}
            batch.event("attempt_ended", job, attempt, facts)

        self._ledger.row(write, job, "end")
        self._jobs.note(
            job,
            attempt,
            verdict.state,
            told=not (running.waits and cause is Cause.STOPPED),
            began=running.since,
            ended_at=now,
            cause=cause,
            message=message,
            result=result,
        )
        if done:
            self._jobs.artifacts[job] = artifact
        self.moved(verdict.moves)
        fit = not kill and cause in REUSED_AFTER and (running.workers == 1 or done)
        self._leave(running, fit, now, quick=done)
        self._ledger.then(lambda: self._clean(job, attempt, done))

    def moved(self, moves: list[Move]) -> None:
        """Store moves that followed from something."""
        for job, state in moves:
            self._ledger.row(partial(Batch.move, job_id=job, state=state), job)
            self._jobs.note(job, self._schedule.attempt(job), state)

    def poll(self, now: float) -> None:
        """Acknowledge and ask for news where it is time."""
        interval = max(POLL_SECONDS, len(self.running) / POLLS_PER_SECOND)
        for running in self.running.values():
            if running.poll_at > now or running.slot is None:
                continue
            running.poll_at = now + interval
            first, *behind = self._by_slot[running.slot]
            if first != running.tail.job:
                continue
            self._pool.poll(running.slot, running.key, running.tail.acknowledged)
            shape = self._slots[running.slot].shape
            if now - running.since > RECALL_SECONDS and self._slots.has_idle(shape):
                # The first is not quick after all, and somebody else can do these sooner.
                for job in behind:
                    self._pool.recall(running.slot, self.running[job].key)

    def next_poll(self) -> float | None:
        return min((running.poll_at for running in self.running.values()), default=None)

    def stop(self) -> None:
        """Ask every running job to checkpoint and stop."""
        for running in self.running.values():
            running.asked = True
            if running.slot is not None:
                self._pool.stop(running.slot, running.key)

    def end_all(self, cause: Cause, now: float) -> None:
        """End every running attempt now."""
        # The end of one may end others: those that waited behind it.
        while self.running:
            self.end(next(iter(self.running)), {"cause": cause, "message": cause}, now, kill=True)

    def take_over(self, job: int, now: float) -> Running:
        """Answer for an attempt that another controller began, without its workers so far."""
        row, shape = self._jobs[job], self._schedule.task(job).resources
        since = row.attempts[-1].started_at
        running = Running(Tail(job, row.attempt), None, shape.workers, since, 0.0, now)
        self.running[job] = running
        self.measuring += shape.exclusive
        return running

    def go_on(self, running: Running, slot: int) -> None:
        """The workers of an attempt that was taken over are this slot's."""
        running.slot = slot
        self._by_slot[slot] = [running.tail.job]
        self._schedule.watch(running.tail.job, running.since)

    def read_file(self, running: Running, now: float) -> None:
        """Take what an attempt's spool still holds, from the file."""
        tail = running.tail
        kept = salvage(self._home, self._jobs[tail.job].identity, tail)
        self._took(running, now)
        running.kept = kept or running.kept

    def _start(self, job: int, slot: int, now: float) -> None:
        attempt = self._schedule.started(job, now)
        row = self._jobs[job]
        workers = row.resources.get("workers", 1)
        restore, found = restore_point(self._home, self._jobs, job, attempt)
        worker = self._pool.name(slot)
        one = self._slots[slot]

        def write(batch: Batch) -> None:
            number = batch.start(job, worker)
            if number != attempt:
                raise RuntimeError(f"job {job}: attempt {number} stored, {attempt} expected")
            if attempt > 1:
                batch.rewind(job, attempt, None if restore is None else restore[0])
            if found is not None:
                batch.checkpoint(job, attempt, *found)

        self._ledger.row(write, job, "start")
        queue = self._by_slot.setdefault(slot, [])
        waits = bool(queue)
        queue.append(job)
        self._jobs.note(
            job, attempt, JobState.RUNNING, told=not waits, started_at=now, ended_at=None
        )
        first = now + POLL_SECONDS
        self.measuring += one.shape.exclusive
        tail = Tail(job, attempt)
        self.running[job] = Running(tail, slot, workers, now, now, first, waits=waits)
        assignments = self._jobs.assignments(
            self._workflow, job, attempt, restore, one, self._pool.rendezvous(slot)
        )
        self._ledger.then(lambda: self._pool.run(slot, assignments))

    def _leave(self, running: Running, fit: bool, now: float, quick: bool) -> None:
        """An attempt leaves its slot: for another job, or for good."""
        slot = running.slot
        if slot is None:
            return
        self._by_slot[slot].remove(running.tail.job)
        if not self._by_slot[slot]:
            del self._by_slot[slot]
        if not fit:
            self._drop(slot, now)
        elif running.workers > 1:
            # Its ranks need a fresh address before the next job.
            self._slots.starting(slot)
            self._starting[slot] = now
            self._ledger.then(partial(self._pool.greet, slot))
        else:
            took = now - max(running.since, self._slots[slot].idle_since)
            self._slots.idle(slot, now, quick=quick and took < QUICK_SECONDS)
            self._next_begins(slot, now)

    def _next_begins(self, slot: int, now: float) -> None:
        """What waited behind the attempt that left runs from now on, unless it is to stop."""
        for job in self._by_slot.get(slot, [])[:1]:
            running = self.running[job]
            if running.waits and not running.asked:
                running.waits, running.since = False, now
                self._jobs.tell(job, running.tail.attempt, JobState.RUNNING)

    def _took(self, running: Running, now: float) -> None:
        tail = running.tail
        if not tail.news:
            return
        if tail.checkpoint is not None and tail.checkpoint != self._jobs.checkpoints.get(tail.job):
            running.kept = now
            self._jobs.note_checkpoint(tail.job, tail.checkpoint)
        self._ledger.record(tail)

    def _judge(self, running: Running, now: float) -> None:
        end = running.end(now)
        if end is not None:
            self.end(running.tail.job, end, now)

    def _drop(self, slot: int, now: float) -> None:
        """Kill the slot, if it is still there; what waited in it is queued again."""
        if slot not in self._slots:
            return
        self._slots.remove(slot)
        self._ledger.then(partial(self._pool.kill, slot))
        for job in self._by_slot.pop(slot, []):
            running = self.running[job]
            running.slot, running.asked = None, True
            self.end(job, {"cause": Cause.STOPPED, "message": WAITED}, now, worked_until=0.0)

    def _clean(self, job: int, attempt: int, done: bool) -> None:
        self._home.spool(job, attempt).unlink(missing_ok=True)
        artifacts.remove(self._home.work(job, attempt))
        if done:
            forget_checkpoints(self._home, self._jobs[job].identity, job)
