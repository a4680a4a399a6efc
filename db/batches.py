"""A batch: all that a controller writes at one instant, in one transaction under its lease."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import update

from kvlab.db import points
from kvlab.db.errors import IllegalMove
from kvlab.db.pending import Head, Pending
from kvlab.db.rows import FinishedJob, NewJob
from kvlab.db.states import MOVES, REUSABLE, Cause, JobState
from kvlab.db.tables import JOBS
from kvlab.db.text import clean, dump


class Batch:
    """Made by `Store.batch`. Every method takes effect when the batch ends without an error.

    What an attempt that is not its job's newest reports is refused: the method returns False (or 0)
    and writes nothing. A change of state that db/states.py does not allow raises IllegalMove.

    Attributes:
        transaction: names it to `Store.committed`, should the answer to its COMMIT be lost. None on
            SQLite, which is asked over no network.
    """

    def __init__(self, pending: Pending, transaction: str | None = None) -> None:
        self._pending = pending
        self.transaction = transaction

    def expect(self, job_ids: Sequence[int]) -> None:
        """Say which jobs the batch is about, so that they are read together. Optional."""
        self._pending.read(job_ids)

    def add(self, jobs: Sequence[NewJob]) -> list[int]:
        """Add jobs to the workflow as `Store.create_workflow` does; return their numbers."""
        return self._pending.add(jobs)

    def resolve(
        self,
        job_id: int,
        spec: Mapping[str, Any],
        parents: Mapping[str, str],
        identity: str,
        parts: Mapping[str, str],
    ) -> None:
        """Say what a job is that had to wait for another's result to be told."""
        self._pending.connection.execute(
            update(JOBS)
            .where(JOBS.c.id == job_id, JOBS.c.workflow_id == self._pending.workflow_id)
            .values(
                spec=dump(dict(spec)),
                parents=dump(dict(parents)),
                identity=clean(identity),
                parts=dump(dict(parts)),
            )
        )

    def start(self, job_id: int, worker: str) -> int:
        """Begin the job's next attempt (QUEUED -> RUNNING) and return its number, from 1."""
        head = self._pending.head(job_id)
        _check(head, JobState.RUNNING)
        head.state = JobState.RUNNING
        head.attempt += 1
        head.started_at = self._pending.now
        head.ended_at = head.cause = head.message = None
        self._pending.open_attempt(job_id, head.attempt, clean(worker))
        return head.attempt

    def end(
        self,
        job_id: int,
        attempt: int,
        cause: Cause,
        state: JobState,
        result: Mapping[str, Any] | None = None,
        artifact_uri: str | None = None,
        message: str | None = None,
        lost_seconds: float = 0.0,
    ) -> bool:
        """End the running attempt; the job goes on to `state`.

        Args:
            state: DONE with cause DONE and a result; QUEUED to try again; FAILED or CANCELLED.
            result: where its `gates` has a closed one (false), no later job takes it, unless its
                `settled` names that gate: the settings alone decide it, for every run alike.
            artifact_uri: where the job's published folder is.
            lost_seconds: work that has to be done again because of this end.

        Returns:
            False when the attempt is an older one, or has ended already.
        """
        head = self._pending.head(job_id)
        if not _is_newest(head, attempt) or head.state is not JobState.RUNNING:
            return False
        _check(head, state)
        done = state is JobState.DONE
        if done != (cause is Cause.DONE) or done != (result is not None):
            raise IllegalMove(
                f"job {job_id}: cause {cause} {'without' if result is None else 'with'} a result "
                f"does not lead to {state}"
            )
        head.state = state
        head.cause = cause.value
        head.message = None if message is None else clean(message)
        head.ended_at = self._pending.now
        if done:
            head.result = dump(result)
            head.reusable = is_reusable(result or {})
            if artifact_uri is not None:
                self._pending.keep(job_id, "result", attempt, None, artifact_uri)
        self._pending.close_attempt(job_id, attempt, head.cause, head.message, lost_seconds)
        return True

    def move(self, job_id: int, state: JobState) -> None:
        """Change a job's state where no attempt begins or ends."""
        head = self._pending.head(job_id)
        if state is JobState.RUNNING or head.state is JobState.RUNNING:
            raise IllegalMove(f"job {job_id}: {head.state} -> {state} takes `start` or `end`")
        _check(head, state)
        head.state = state
        ended = state in (JobState.SKIPPED, JobState.CANCELLED)
        head.ended_at = self._pending.now if ended else None
        head.cause = head.message = None

    def reuse(self, job_id: int, finished: FinishedJob) -> None:
        """Let the job be done with another job's result, without an attempt of its own."""
        head = self._pending.head(job_id)
        if head.state not in REUSABLE:
            raise IllegalMove(f"job {job_id} is {head.state} and cannot reuse a result")
        head.changed = True
        head.state = JobState.DONE
        head.cause, head.message = Cause.DONE.value, None
        head.ended_at = self._pending.now
        head.reused_from = finished.job_id
        head.result = dump(finished.result)
        if finished.artifact_uri is not None:
            self._pending.keep(job_id, "result", head.attempt, None, finished.artifact_uri)

    def points(self, job_id: int, attempt: int, rows: Iterable[tuple[str, int, float, int]]) -> int:
        """Store metric points (key, step, value, time in ms); return how many, 0 when refused.

        A point replaces the one of the same key and step; of several in `rows` the last counts.
        """
        if not _is_newest(self._pending.head(job_id), attempt):
            return 0
        return points.write(self._pending.connection, job_id, attempt, rows)

    def checkpoint(self, job_id: int, attempt: int, step: int, uri: str) -> bool:
        """Make a checkpoint visible: the job's next attempt may begin from it."""
        head = self._pending.head(job_id)
        if not _is_newest(head, attempt) or head.state is not JobState.RUNNING:
            return False
        self._pending.keep(job_id, "checkpoint", attempt, step, uri)
        return True

    def rewind(self, job_id: int, attempt: int, after_step: int | None) -> bool:
        """State which checkpoint an attempt began from (None: nothing) and drop what had followed.

        Points of earlier attempts after that step go, those up to it stay. An earlier attempt's
        checkpoint beyond it goes too, since its points are gone.
        """
        if not _is_newest(self._pending.head(job_id), attempt):
            return False
        points.drop_after(self._pending.connection, job_id, attempt, after_step)
        self._pending.drop_checkpoint(job_id, attempt, after_step)
        self._pending.begin_from(job_id, attempt, after_step)
        return True

    def event(
        self,
        kind: str,
        job_id: int | None = None,
        attempt: int | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a line to the workflow's history."""
        self._pending.events.append(
            {
                "workflow_id": self._pending.workflow_id,
                "job_id": job_id,
                "attempt": attempt,
                "kind": kind,
                "data": dump(data or {}),
                "at": self._pending.now,
            }
        )

    def mirrored(
        self, job_id: int, *, step: int | None = None, state: JobState | None = None
    ) -> None:
        """Note what MLflow is known to hold: every point up to `step`, and the job's `state`."""
        held = {"mirrored_step": step, "mirrored_state": None if state is None else state.value}
        known = {name: value for name, value in held.items() if value is not None}
        if known:
            self._pending.connection.execute(
                update(JOBS)
                .where(JOBS.c.id == job_id, JOBS.c.workflow_id == self._pending.workflow_id)
                .values(known)
            )


def _check(head: Head, state: JobState) -> None:
    if state not in MOVES[head.state]:
        raise IllegalMove(f"job {head.id} is {head.state} and cannot become {state}")
    head.changed = True


def is_reusable(result: Mapping[str, Any]) -> bool:
    """Whether another job may be done with a result: it has no closed gate but settled ones."""
    closed = {name for name, open_ in (result.get("gates") or {}).items() if open_ is False}
    return closed <= set(result.get("settled") or ())


def _is_newest(head: Head, attempt: int) -> bool:
    if not 1 <= attempt <= head.attempt:
        raise IllegalMove(f"job {head.id} has had {head.attempt} attempts: {attempt} is none")
    return attempt == head.attempt
