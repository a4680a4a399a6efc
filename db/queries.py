"""Reads: each is a few statements in one snapshot, and decodes into plain rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, select

from kvlab.db.errors import NotFound
from kvlab.db.rows import (
    AttemptRow,
    Checkpoint,
    Event,
    FinishedJob,
    JobRow,
    JobStatus,
    Status,
    Workflow,
    WorkflowRow,
)
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.tables import ARTIFACTS, ATTEMPTS, EVENTS, JOBS, WORKFLOWS

_W, _J, _A, _R, _E = WORKFLOWS.c, JOBS.c, ATTEMPTS.c, ARTIFACTS.c, EVENTS.c
_ROW = (
    _W.id, _W.name, _W.state, _W.created_at, _W.ended_at, _W.owner, _W.expires_at, _W.token,
    _W.request,
)  # fmt: skip
_AT_ONCE = 5_000  # identities per statement: below both databases' limits on parameters


def workflows(connection: Connection) -> list[WorkflowRow]:
    """Every workflow, newest first."""
    return [_workflow(row) for row in connection.execute(select(*_ROW).order_by(_W.id.desc()))]


def latest(connection: Connection, name: str) -> int | None:
    """The newest workflow of that name."""
    newest = select(_W.id).where(_W.name == name).order_by(_W.id.desc()).limit(1)
    found: int | None = connection.execute(newest).scalar()
    return found


def finished(connection: Connection, identities: Iterable[str]) -> dict[str, FinishedJob]:
    """For each identity that has a result of its own making whose gates are open: the newest."""
    wanted = list(dict.fromkeys(identities))
    found: dict[str, FinishedJob] = {}
    done = (
        select(_J.identity, _J.id, _J.workflow_id, _J.result, _R.uri, _J.ended_at)
        .outerjoin(ARTIFACTS, (_R.job_id == _J.id) & (_R.role == "result"))
        .where(_J.state == JobState.DONE.value, _J.reusable)
        .order_by(_J.ended_at, _J.id)
    )
    for first in range(0, len(wanted), _AT_ONCE):
        some = done.where(_J.identity.in_(wanted[first : first + _AT_ONCE]))
        for identity, job_id, workflow_id, result, uri, ended_at in connection.execute(some):
            found[identity] = FinishedJob(job_id, workflow_id, json.loads(result), uri, ended_at)
    return found


def load(connection: Connection, workflow_id: int) -> Workflow:
    """Everything a controller needs to take a workflow over."""
    row, text, report = _one(connection, workflow_id)
    attempts: dict[int, list[AttemptRow]] = {}
    for job_id, number, worker, start, end, cause, message, lost, step in connection.execute(
        select(
            _A.job_id, _A.number, _A.worker, _A.started_at, _A.ended_at, _A.cause, _A.message,
            _A.lost_seconds, _A.from_step,
        )
        .join(JOBS, _J.id == _A.job_id)
        .where(_J.workflow_id == workflow_id)
        .order_by(_A.job_id, _A.number)
    ):  # fmt: skip
        why = None if cause is None else Cause(cause)
        attempts.setdefault(job_id, []).append(
            AttemptRow(number, worker, start, end, why, message, lost, step)
        )
    uris: dict[int, str] = {}
    checkpoints: dict[int, Checkpoint] = {}
    for job_id, role, step, uri, attempt in connection.execute(
        select(_R.job_id, _R.role, _R.step, _R.uri, _R.attempt)
        .join(JOBS, _J.id == _R.job_id)
        .where(_J.workflow_id == workflow_id)
    ):
        if role == "result":
            uris[job_id] = uri
        else:
            checkpoints[job_id] = Checkpoint(step, uri, attempt)
    jobs = connection.execute(select(JOBS).where(_J.workflow_id == workflow_id).order_by(_J.id))
    return Workflow(
        row,
        text,
        json.loads(report),
        tuple(
            _job(job, tuple(attempts.get(job.id, ())), uris.get(job.id), checkpoints.get(job.id))
            for job in jobs
        ),
    )


def status(connection: Connection, workflow_id: int) -> Status:
    """What `kvlab status` shows: no specs, no results."""
    row, _, _ = _one(connection, workflow_id)
    jobs = connection.execute(
        select(
            _J.id, _J.name, _J.job, _J.kind, _J.state, _J.attempt, _J.cause, _J.message,
            _J.reused_from, _J.started_at, _J.ended_at,
        )
        .where(_J.workflow_id == workflow_id)
        .order_by(_J.id)
    )  # fmt: skip
    return Status(
        row,
        tuple(
            JobStatus(
                number, name, job, kind, JobState(state), attempt, cause and Cause(cause), *rest
            )
            for number, name, job, kind, state, attempt, cause, *rest in jobs
        ),
    )


def events(connection: Connection, workflow_id: int, after: int = 0) -> list[Event]:
    """A workflow's history, oldest first, from the event after number `after`."""
    rows = connection.execute(
        select(_E.id, _E.kind, _E.job_id, _E.attempt, _E.data, _E.at)
        .where(_E.workflow_id == workflow_id, _E.id > after)
        .order_by(_E.id)
    )
    return [
        Event(n, kind, job, tried, json.loads(data), at) for n, kind, job, tried, data, at in rows
    ]


def _one(connection: Connection, workflow_id: int) -> tuple[WorkflowRow, str, str]:
    found = connection.execute(
        select(*_ROW, _W.text, _W.report).where(_W.id == workflow_id)
    ).one_or_none()
    if found is None:
        raise NotFound(f"there is no workflow {workflow_id}: see `kvlab status`")
    *row, text, report = found
    return _workflow(row), text, report


def _workflow(row: Sequence[Any]) -> WorkflowRow:
    number, name, state, *rest = row
    return WorkflowRow(number, name, WorkflowState(state), *rest)


def _job(
    row: Any, attempts: tuple[AttemptRow, ...], uri: str | None, checkpoint: Checkpoint | None
) -> JobRow:
    return JobRow(
        id=row.id,
        name=row.name,
        job=row.job,
        kind=row.kind,
        spec=json.loads(row.spec),
        axes=json.loads(row.axes),
        parents=json.loads(row.parents),
        needs=tuple(json.loads(row.needs)),
        identity=row.identity,
        parts=json.loads(row.parts),
        resources=json.loads(row.resources),
        retries=json.loads(row.retries),
        timeout=row.timeout,
        state=JobState(row.state),
        attempt=row.attempt,
        cause=None if row.cause is None else Cause(row.cause),
        message=row.message,
        result=None if row.result is None else json.loads(row.result),
        artifact_uri=uri,
        reused_from=row.reused_from,
        started_at=row.started_at,
        ended_at=row.ended_at,
        checkpoint=checkpoint,
        mirrored_step=row.mirrored_step,
        mirrored_state=None if row.mirrored_state is None else JobState(row.mirrored_state),
        attempts=attempts,
    )
