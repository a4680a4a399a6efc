"""A batch: all that a controller writes at one instant, in one transaction under its lease.

Jobs are read when first touched and written once, at the end, in a few statements for the whole
batch. That is safe because the guard keeps every other writer of this workflow out until then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from kvlab.db import points
from kvlab.db.errors import IllegalMove
from kvlab.db.rows import FinishedJob, Lease
from kvlab.db.states import MOVES, REUSABLE, Cause, JobState
from kvlab.db.tables import ARTIFACTS, ATTEMPTS, EVENTS, JOBS

_J, _A, _R = JOBS.c, ATTEMPTS.c, ARTIFACTS.c

_HEAD = select(
    _J.id, _J.state, _J.attempt, _J.cause, _J.message, _J.started_at, _J.ended_at, _J.reused_from
).where(_J.id == bindparam("job"), _J.workflow_id == bindparam("workflow"))
_SAVE = (
    update(JOBS)
    .where(_J.id == bindparam("of_job"))
    .values(
        {
            "result": func.coalesce(bindparam("new_result"), _J.result),
            **{
                name: bindparam(f"new_{name}")
                for name in (
                    "state", "attempt", "cause", "message", "started_at", "ended_at", "reused_from"
                )
            },
        }
    )
)  # fmt: skip
_CLOSE = (
    update(ATTEMPTS)
    .where(_A.job_id == bindparam("of_job"), _A.number == bindparam("of_attempt"))
    .values(
        ended_at=bindparam("at"),
        cause=bindparam("why"),
        message=bindparam("said"),
        lost_seconds=bindparam("lost"),
    )
)


@dataclass(slots=True)
class _Head:
    """A job's changing columns, as they will stand when the batch is written."""

    id: int
    state: JobState
    attempt: int
    cause: str | None
    message: str | None
    started_at: float | None
    ended_at: float | None
    reused_from: int | None
    result: str | None = None
    changed: bool = False


class Batch:
    """Made by `Store.batch`. Every method takes effect when the batch ends without an error.

    Messages of an attempt that is not the job's newest are refused: the method returns False (or
    0) and writes nothing. A change of state that db/states.py does not allow raises IllegalMove.
    """

    def __init__(self, connection: Connection, lease: Lease, now: float) -> None:
        self._connection = connection
        self._lease = lease
        self._now = now
        self._heads: dict[int, _Head] = {}
        self._opened: list[dict[str, Any]] = []
        self._closed: list[dict[str, Any]] = []
        self._artifacts: dict[tuple[int, str], dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []

    def start(self, job_id: int, worker: str) -> int:
        """Begin the job's next attempt (QUEUED -> RUNNING) and return its number, from 1."""
        head = self._head(job_id)
        self._check(head, JobState.RUNNING)
        head.state = JobState.RUNNING
        head.attempt += 1
        head.started_at = self._now
        head.ended_at = head.cause = head.message = None
        self._opened.append(
            {
                "job_id": job_id,
                "number": head.attempt,
                "worker": clean(worker),
                "started_at": self._now,
                "lost_seconds": 0.0,
            }
        )
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
            artifact_uri: where the job's published folder is.
            lost_seconds: work that has to be done again because of this end.

        Returns:
            False when the attempt is an older one, or has ended already.
        """
        head = self._head(job_id)
        if not self._newest(head, attempt) or head.state is not JobState.RUNNING:
            return False
        self._check(head, state)
        if (state is JobState.DONE) != (cause is Cause.DONE):
            raise IllegalMove(f"job {job_id}: {cause} does not lead to {state}")
        if state is JobState.DONE and result is None:
            raise IllegalMove(f"job {job_id}: done without a result")
        said = None if message is None else clean(message)
        head.state, head.cause, head.message = state, cause.value, said
        head.ended_at = self._now
        if state is JobState.DONE:
            head.result = json.dumps(result)
            if artifact_uri is not None:
                self._artifact(job_id, "result", attempt, None, artifact_uri)
        self._closed.append(
            {
                "of_job": job_id,
                "of_attempt": attempt,
                "at": self._now,
                "why": cause.value,
                "said": said,
                "lost": lost_seconds,
            }
        )
        return True

    def move(self, job_id: int, state: JobState) -> None:
        """Change a job's state where no attempt begins or ends."""
        head = self._head(job_id)
        self._check(head, state)
        if state is JobState.RUNNING or head.state is JobState.RUNNING:
            raise IllegalMove(f"job {job_id}: {head.state} -> {state} takes `start` or `end`")
        head.state = state
        ended = state in (JobState.SKIPPED, JobState.CANCELLED)
        head.ended_at = self._now if ended else None
        head.cause = head.message = None

    def reuse(self, job_id: int, finished: FinishedJob) -> None:
        """Let the job be done with another job's result, without an attempt of its own."""
        head = self._head(job_id)
        if head.state not in REUSABLE:
            raise IllegalMove(f"job {job_id} is {head.state} and cannot reuse a result")
        head.changed = True
        head.state, head.cause, head.message = JobState.DONE, Cause.DONE.value, None
        head.ended_at = self._now
        head.reused_from = finished.job_id
        head.result = json.dumps(finished.result)
        if finished.artifact_uri is not None:
            self._artifact(job_id, "result", head.attempt, None, finished.artifact_uri)

    def points(self, job_id: int, attempt: int, rows: Iterable[tuple[str, int, float, int]]) -> int:
        """Store metric points (key, step, value, time in ms); return how many, 0 when refused.

        A point replaces the one of the same key and step; of several in `rows` the last counts.
        """
        if not self._newest(self._head(job_id), attempt):
            return 0
        return points.write(self._connection, job_id, attempt, rows)

    def checkpoint(self, job_id: int, attempt: int, step: int, uri: str) -> bool:
        """Make a checkpoint visible: the job's next attempt may begin from it."""
        head = self._head(job_id)
        if not self._newest(head, attempt) or head.state is not JobState.RUNNING:
            return False
        self._artifact(job_id, "checkpoint", attempt, step, uri)
        return True

    def rewind(self, job_id: int, attempt: int, after_step: int | None) -> bool:
        """State which checkpoint an attempt began from (None: from nothing) and drop what followed.

        Points of earlier attempts after that step go, those up to it stay; so does a checkpoint
        beyond it, whose points would be gone.
        """
        if not self._newest(self._head(job_id), attempt):
            return False
        points.drop_after(self._connection, job_id, attempt, after_step)
        stale = delete(ARTIFACTS).where(
            _R.job_id == job_id, _R.role == "checkpoint", _R.attempt < attempt
        )
        self._connection.execute(stale if after_step is None else stale.where(_R.step > after_step))
        for opened in self._opened:
            if (opened["job_id"], opened["number"]) == (job_id, attempt):
                opened["from_step"] = after_step
                return True
        self._connection.execute(
            update(ATTEMPTS)
            .where(_A.job_id == job_id, _A.number == attempt)
            .values(from_step=after_step)
        )
        return True

    def event(
        self,
        kind: str,
        job_id: int | None = None,
        attempt: int | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a line to the workflow's history."""
        self._events.append(
            {
                "workflow_id": self._lease.workflow_id,
                "job_id": job_id,
                "attempt": attempt,
                "kind": kind,
                "data": json.dumps(data or {}),
                "at": self._now,
            }
        )

    def mirrored(
        self, job_id: int, *, step: int | None = None, state: JobState | None = None
    ) -> None:
        """Note what MLflow is known to hold: every point up to `step`, and the job's `state`."""
        held = {"mirrored_step": step, "mirrored_state": state and state.value}
        known = {name: value for name, value in held.items() if value is not None}
        if known:
            self._connection.execute(
                update(JOBS)
                .where(_J.id == job_id, _J.workflow_id == self._lease.workflow_id)
                .values(known)
            )

    def write(self) -> None:
        """Send what was gathered; called once, by `Store.batch`, before it commits."""
        send = self._connection.execute
        changed = [
            {"of_job": head.id, **{f"new_{name}": getattr(head, name) for name in _SAVED}}
            for head in self._heads.values()
            if head.changed
        ]
        if changed:
            send(_SAVE, changed)
        if self._opened:
            send(insert(ATTEMPTS), [{"from_step": None, **row} for row in self._opened])
        if self._closed:
            send(_CLOSE, self._closed)
        if self._artifacts:
            send(_KEEP[self._connection.dialect.name], list(self._artifacts.values()))
        if self._events:
            send(insert(EVENTS), self._events)

    def _head(self, job_id: int) -> _Head:
        head = self._heads.get(job_id)
        if head is None:
            row = self._connection.execute(
                _HEAD, {"job": job_id, "workflow": self._lease.workflow_id}
            ).one_or_none()
            if row is None:
                raise LookupError(f"workflow {self._lease.workflow_id} has no job {job_id}")
            number, state, *rest = row
            head = self._heads[job_id] = _Head(number, JobState(state), *rest)
        return head

    def _check(self, head: _Head, state: JobState) -> None:
        if state not in MOVES[head.state]:
            raise IllegalMove(f"job {head.id} is {head.state} and cannot become {state}")
        head.changed = True

    def _newest(self, head: _Head, attempt: int) -> bool:
        if not 1 <= attempt <= head.attempt:
            raise IllegalMove(f"job {head.id} has had {head.attempt} attempts, not {attempt}")
        return attempt == head.attempt

    def _artifact(self, job_id: int, role: str, attempt: int, step: int | None, uri: str) -> None:
        self._artifacts[job_id, role] = {
            "job_id": job_id,
            "role": role,
            "attempt": attempt,
            "step": step,
            "uri": uri,
            "created_at": self._now,
        }


_SAVED = (
    "result", "state", "attempt", "cause", "message", "started_at", "ended_at", "reused_from"
)  # fmt: skip


def _keep(insert_for: Any) -> Any:
    statement = insert_for(ARTIFACTS)
    new = {name: statement.excluded[name] for name in ("attempt", "step", "uri", "created_at")}
    return statement.on_conflict_do_update(index_elements=["job_id", "role"], set_=new)


_KEEP = {"sqlite": _keep(sqlite.insert), "postgresql": _keep(postgresql.insert)}


def clean(text: str) -> str:
    """Text that every database takes: no NUL, no lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
