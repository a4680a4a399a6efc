"""What a batch has gathered and not sent yet.

Jobs are read when first touched and everything is written once, at the end, in a few statements for
the whole batch: a commit of eight jobs costs little more than a commit of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from kvlab.db.rows import NewJob, first_state
from kvlab.db.states import JobState
from kvlab.db.tables import ARTIFACTS, ATTEMPTS, EVENTS, JOBS
from kvlab.db.text import clean, dump

_J, _A, _R = JOBS.c, ATTEMPTS.c, ARTIFACTS.c
_CHANGING = ("state", "attempt", "cause", "message", "started_at", "ended_at", "reused_from")
_SAVED = (*_CHANGING, "result", "reusable")

_READ = select(_J.id, *(_J[name] for name in _CHANGING)).where(
    _J.id == bindparam("of_job"), _J.workflow_id == bindparam("of_workflow")
)
_READ_SEVERAL = select(_J.id, *(_J[name] for name in _CHANGING)).where(
    _J.id.in_(bindparam("of_jobs", expanding=True)), _J.workflow_id == bindparam("of_workflow")
)
_AT_ONCE = 500
_SAVE = (
    update(JOBS)
    .where(_J.id == bindparam("of_job"))
    .values({name: bindparam(f"new_{name}") for name in _SAVED})
)
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


def _keep(insert_into: Any) -> Any:
    statement = insert_into(ARTIFACTS)
    new = {name: statement.excluded[name] for name in ("attempt", "step", "uri", "created_at")}
    return statement.on_conflict_do_update(index_elements=["job_id", "role"], set_=new)


_KEEP = {"sqlite": _keep(sqlite.insert), "postgresql": _keep(postgresql.insert)}


@dataclass(slots=True)
class Head:
    """A job's changing columns, as they will stand once the batch is written.

    `result` and `reusable` are not read: only the move to DONE sets them, and nothing leaves DONE.
    """

    id: int
    state: JobState
    attempt: int
    cause: str | None
    message: str | None
    started_at: float | None
    ended_at: float | None
    reused_from: int | None
    result: str | None = None
    reusable: bool = False
    changed: bool = False


@dataclass(slots=True)
class Pending:
    """The rows of one batch, over the transaction that will write them."""

    connection: Connection
    workflow_id: int
    now: float
    heads: dict[int, Head] = field(default_factory=dict)
    opened: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    closed: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def read(self, job_ids: Sequence[int]) -> None:
        """Read jobs that are about to be touched: one statement instead of one each."""
        for first in range(0, len(job_ids), _AT_ONCE):
            some = [one for one in job_ids[first : first + _AT_ONCE] if one not in self.heads]
            wanted = {"of_jobs": some, "of_workflow": self.workflow_id}
            for number, state, *rest in self.connection.execute(_READ_SEVERAL, wanted):
                self.heads[number] = Head(number, JobState(state), *rest)

    def head(self, job_id: int) -> Head:
        """The job as it stands in this batch. A job of another workflow is a LookupError."""
        if job_id not in self.heads:
            row = self.connection.execute(
                _READ, {"of_job": job_id, "of_workflow": self.workflow_id}
            ).one_or_none()
            if row is None:
                raise LookupError(f"workflow {self.workflow_id} has no job {job_id}")
            number, state, *rest = row
            self.heads[job_id] = Head(number, JobState(state), *rest)
        return self.heads[job_id]

    def add(self, jobs: Sequence[NewJob]) -> list[int]:
        """Store new jobs of the workflow at once, and return their numbers."""
        return [
            self.connection.execute(
                insert(JOBS).values(new_row(self.workflow_id, job)).returning(_J.id)
            ).scalar_one()
            for job in jobs
        ]

    def open_attempt(self, job_id: int, number: int, worker: str) -> None:
        self.opened[job_id, number] = {
            "job_id": job_id,
            "number": number,
            "worker": worker,
            "started_at": self.now,
            "lost_seconds": 0.0,
            "from_step": None,
        }

    def close_attempt(
        self, job_id: int, number: int, cause: str, message: str | None, lost: float
    ) -> None:
        self.closed.append(
            {
                "of_job": job_id,
                "of_attempt": number,
                "at": self.now,
                "why": cause,
                "said": message,
                "lost": lost,
            }
        )

    def begin_from(self, job_id: int, number: int, step: int | None) -> None:
        """Note the checkpoint that an attempt began from, whether its row is written yet or not."""
        if (job_id, number) in self.opened:
            self.opened[job_id, number]["from_step"] = step
            return
        attempt = update(ATTEMPTS).where(_A.job_id == job_id, _A.number == number)
        self.connection.execute(attempt.values(from_step=step))

    def keep(self, job_id: int, role: str, attempt: int, step: int | None, uri: str) -> None:
        """Put an artifact in place of the job's earlier one of that role."""
        self.artifacts[job_id, role] = {
            "job_id": job_id,
            "role": role,
            "attempt": attempt,
            "step": step,
            "uri": uri,
            "created_at": self.now,
        }

    def drop_checkpoint(self, job_id: int, attempt: int, after_step: int | None) -> None:
        """Delete an earlier attempt's checkpoint if it is beyond `after_step` (None: any)."""
        kept = self.artifacts.get((job_id, "checkpoint"))
        if kept and kept["attempt"] < attempt and (after_step is None or kept["step"] > after_step):
            del self.artifacts[job_id, "checkpoint"]
        stale = delete(ARTIFACTS).where(
            _R.job_id == job_id, _R.role == "checkpoint", _R.attempt < attempt
        )
        self.connection.execute(stale if after_step is None else stale.where(_R.step > after_step))

    def write(self) -> None:
        """Send everything that was gathered."""
        send = self.connection.execute
        changed = [head for head in self.heads.values() if head.changed]
        if changed:
            send(
                _SAVE,
                [
                    {"of_job": head.id, **{f"new_{name}": getattr(head, name) for name in _SAVED}}
                    for head in changed
                ],
            )
        if self.opened:
            send(insert(ATTEMPTS), list(self.opened.values()))
        if self.closed:
            send(_CLOSE, self.closed)
        if self.artifacts:
            send(_KEEP[self.connection.dialect.name], list(self.artifacts.values()))
        if self.events:
            send(insert(EVENTS), self.events)


def new_row(workflow_id: int, job: NewJob) -> dict[str, Any]:
    """The columns of a job that nothing happened to yet."""
    return {
        "workflow_id": workflow_id,
        "name": clean(job.name),
        "job": clean(job.job),
        "kind": clean(job.kind),
        "state": first_state(job).value,
        "attempt": 0,
        "reusable": False,
        "identity": clean(job.identity),
        "axes": dump(dict(job.axes)),
        "parents": dump(dict(job.parents)),
        "needs": dump(list(job.needs)),
        "parts": dump(dict(job.parts)),
        "resources": dump(dict(job.resources)),
        "retries": dump(dict(job.retries)),
        "timeout": job.timeout,
        "spec": dump(dict(job.spec)),
    }
