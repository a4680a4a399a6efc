"""What the controller tells the MLflow mirror. Plain JSON, so a message may cross processes.

A message states how things ARE (the newest row of a workflow, of some of its jobs, and points that
are final), never what to do, so sending one again changes nothing. Times are seconds since the
epoch, those of points milliseconds; both are the ones stored in SQL, because MLflow takes a point
with another timestamp for another point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class WorkflowMessage(TypedDict):
    """The workflow row: state is a `kvlab.db.states.WorkflowState`."""

    id: int
    name: str
    state: str
    created_at: float
    ended_at: NotRequired[float | None]
    text: NotRequired[str]


class JobMessage(TypedDict):
    """A job row. `name` is the cell; `state` is a `kvlab.db.states.JobState`.

    `model` is the spec of the job that made the model this one measures (role `of`), so that an
    evaluation carries the method it is about; omitted where the job has no such parent.
    """

    id: int
    name: str
    job: str
    kind: str
    identity: str
    state: str
    axes: Mapping[str, Any]
    spec: Mapping[str, Any]
    model: NotRequired[Mapping[str, Any] | None]
    started_at: NotRequired[float | None]
    ended_at: NotRequired[float | None]
    cause: NotRequired[str | None]
    message: NotRequired[str | None]
    result: NotRequired[Mapping[str, Any] | None]
    reused_from: NotRequired[int | None]


class PointMessage(TypedDict):
    """One metric point that will not change any more."""

    job_id: int
    key: str
    step: int
    value: float
    time_ms: int


class Message(TypedDict):
    """One item of `Mirror.send`'s batch: a workflow, and whichever of the rest is news.

    A job's points may only come with, or after, a message that had the job itself. `report` is the
    text of report.html, kept as an artifact of the workflow's run.
    """

    workflow: WorkflowMessage
    jobs: NotRequired[list[JobMessage]]
    points: NotRequired[list[PointMessage]]
    report: NotRequired[str]
