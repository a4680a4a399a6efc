"""What the store takes and gives: plain values, detached from any database session.

Times are epoch seconds, except a point's `time_ms`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvlab.db.states import Cause, JobState, WorkflowState


@dataclass(frozen=True, slots=True)
class NewJob:
    """One cell of a graph to be stored; every mapping is JSON. See `kvlab.platform.graph.Cell`."""

    name: str
    job: str
    kind: str
    spec: Mapping[str, Any]
    axes: Mapping[str, Any]
    parents: Mapping[str, str]
    needs: tuple[str, ...]
    identity: str
    parts: Mapping[str, str]
    resources: Mapping[str, Any] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change one workflow. `token` grows with every claim and fences older holders."""

    workflow_id: int
    token: int
    owner: str


class FinishedJob(NamedTuple):
    """The newest job of an identity that has a result of its own, with no gate closed."""

    job_id: int
    workflow_id: int
    result: dict[str, Any]
    artifact_uri: str | None
    ended_at: float


class Checkpoint(NamedTuple):
    """The visible checkpoint of a job, and the attempt that wrote it."""

    step: int
    uri: str
    attempt: int


class Point(NamedTuple):
    """One metric point as stored."""

    key: str
    step: int
    value: float
    time_ms: int
    attempt: int


class Event(NamedTuple):
    """One line of a workflow's history."""

    id: int
    kind: str
    job_id: int | None
    attempt: int | None
    data: dict[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One try at a job.

    `from_step` is the checkpoint it began from, `lost_seconds` what its end cost.
    """

    number: int
    worker: str
    started_at: float
    ended_at: float | None
    cause: Cause | None
    message: str | None
    lost_seconds: float
    from_step: int | None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job with its attempts (oldest first), checkpoint and result.

    `attempt` is the newest attempt's number, 0 before the first. `mirrored_step` and
    `mirrored_state` are what MLflow is known to hold.
    """

    id: int
    name: str
    job: str
    kind: str
    spec: dict[str, Any]
    axes: dict[str, Any]
    parents: dict[str, str]
    needs: tuple[str, ...]
    identity: str
    parts: dict[str, str]
    resources: dict[str, Any]
    retries: dict[str, int]
    timeout: float | None
    state: JobState
    attempt: int
    cause: Cause | None
    message: str | None
    result: dict[str, Any] | None
    artifact_uri: str | None
    reused_from: int | None
    started_at: float | None
    ended_at: float | None
    checkpoint: Checkpoint | None
    mirrored_step: int | None
    mirrored_state: JobState | None
    attempts: tuple[AttemptRow, ...]


def first_state(job: NewJob) -> JobState:
    """Where a job begins: it waits for those that it builds on."""
    return JobState.WAITING if job.parents or job.needs else JobState.QUEUED


def fresh(number: int, job: NewJob) -> JobRow:
    """The row of a job that has just been stored."""
    return JobRow(
        id=number,
        name=job.name,
        job=job.job,
        kind=job.kind,
        spec=dict(job.spec),
        axes=dict(job.axes),
        parents=dict(job.parents),
        needs=tuple(job.needs),
        identity=job.identity,
        parts=dict(job.parts),
        resources=dict(job.resources),
        retries=dict(job.retries),
        timeout=job.timeout,
        state=first_state(job),
        attempt=0,
        cause=None,
        message=None,
        result=None,
        artifact_uri=None,
        reused_from=None,
        started_at=None,
        ended_at=None,
        checkpoint=None,
        mirrored_step=None,
        mirrored_state=None,
        attempts=(),
    )


@dataclass(frozen=True, slots=True)
class WorkflowRow:
    """A workflow without its jobs.

    `owner` and `expires_at` are the lease's: state RUNNING with a lease that ended means that its
    controller died. `request` is what somebody asked the controller to do.
    """

    id: int
    name: str
    state: WorkflowState
    created_at: float
    ended_at: float | None
    owner: str | None
    expires_at: float | None
    token: int
    request: str | None


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow as it stood at one instant."""

    row: WorkflowRow
    text: str
    report: dict[str, Any]
    jobs: tuple[JobRow, ...]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as `kvlab status` lists it."""

    id: int
    name: str
    job: str
    kind: str
    state: JobState
    attempt: int
    cause: Cause | None
    message: str | None
    reused_from: int | None
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """Counts and rows of a workflow, without specs and results."""

    row: WorkflowRow
    jobs: tuple[JobStatus, ...]

    @property
    def counts(self) -> dict[JobState, int]:
        """Jobs per state, in the order of the states; states without jobs are left out."""
        found = Counter(job.state for job in self.jobs)
        return {state: found[state] for state in JobState if found[state]}
