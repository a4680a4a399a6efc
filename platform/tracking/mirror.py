"""Keeps MLflow's copy of what the store holds; nothing is ever read back from it as truth.

This module is light: MLflow (seconds and hundreds of MB) is imported by the first `send`, in the
process that holds the Mirror, never in the controller.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.states import JobState, WorkflowState
from kvlab.platform.tracking.address import artifacts_of, shown
from kvlab.platform.tracking.describe import (
    ENDED,
    STATUS,
    WORKFLOW_STATUS,
    job_tags,
    key_text,
    metrics,
    milliseconds,
    params,
    workflow_tags,
)
from kvlab.platform.tracking.messages import JobMessage, Message, PointMessage, WorkflowMessage

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LARGEST_BATCH = 1000
"""Metric points per request: MLflow's own limit."""

PARENT = "mlflow.parentRunId"
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's interface open its views for training runs, not those for agents."""
STARTED = frozenset({JobState.RUNNING, JobState.DONE, JobState.FAILED})


class MirrorError(KvlabError):
    """MLflow did not take what it was sent. Jobs and the store are not affected."""


class MirrorUnreachable(MirrorError):
    """No answer in time, or its database is busy: send the same again later."""


class MirrorRefused(MirrorError):
    """MLflow refuses the content: sending it again cannot help."""


class Mirror:
    """Sends messages to one MLflow server or database.

    A workflow is a run of the experiment `kvlab/<name>`; its jobs are runs nested under it. Runs
    are found again by their tags, and points carry the store's own timestamps, so any message may
    be sent again, by this Mirror or another, and nothing is doubled. One Mirror at a time may write
    a workflow. Not thread safe.
    """

    def __init__(
        self,
        tracking_uri: str,
        artifacts: str | None = None,
        *,
        timeout: int = 10,
        retries: int = 1,
    ) -> None:
        """Prepare; nothing is imported or connected yet.

        Args:
            tracking_uri: `sqlite:///FILE`, `postgresql://...` or `http://...`.
            artifacts: where new experiments keep artifacts; None is `mlflow-artifacts` beside a
                SQLite file, and whatever the server decides otherwise.
            timeout, retries: of one HTTP request (seconds; attempts beyond the first); MLflow's
                own MLFLOW_HTTP_REQUEST_* variables win where they are set.
        """
        self._uri = tracking_uri
        self._artifacts = artifacts or artifacts_of(tracking_uri)
        for name, value in (
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries),
            ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", 0),
            ("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", 0),
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ):
            os.environ.setdefault(name, str(value))
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._parents: dict[tuple[int, float], str] = {}
        self._runs: dict[str, dict[int, str]] = {}
        self._params: dict[str, set[str]] = {}

    def send(self, batch: Sequence[Message]) -> dict[str, Any]:
        """Bring MLflow up to what the messages say, in their order.

        Returns:
            {"workflows": {id: run id}, "jobs": {job id: {"run_id", "state", "step"}}}: what MLflow
            now holds of the jobs that were sent; "step" is the highest one sent (None: no points).

        Raises:
            MirrorUnreachable: part of the batch may have arrived; send all of it again.
            MirrorRefused: see there.
        """
        marks: dict[str, Any] = {"workflows": {}, "jobs": {}}
        with self._told():
            for message in batch:
                self._send(message, marks)
        return marks

    def close(self) -> None:
        """Forget the connection. The next `send` makes a new one and finds its runs again."""
        self._client = None
        self._experiments.clear()
        self._parents.clear()
        self._runs.clear()
        self._params.clear()

    def _send(self, message: Message, marks: dict[str, Any]) -> None:
        workflow = message["workflow"]
        parent = self._parent(workflow)
        marks["workflows"][workflow["id"]] = parent
        jobs = message.get("jobs", [])
        for job in jobs:
            if self._run(workflow, parent, job) is not None:
                marks["jobs"].setdefault(job["id"], {"step": None})
        for job_id, points in _by_job(message.get("points", [])).items():
            self._log_points(parent, job_id, points)
            mark = marks["jobs"].setdefault(job_id, {"step": None})
            mark["step"] = max(point["step"] for point in points)
        # Last, so that a run which reads FINISHED has everything.
        for job in jobs:
            run_id = self._runs[parent].get(job["id"])
            if run_id is not None:
                self._finish(workflow, job, run_id)
                marks["jobs"][job["id"]] |= {"run_id": run_id, "state": job["state"]}
        if (report := message.get("report")) is not None:
            self._connection().log_text(parent, report, "report.html")
        self._status(
            parent, WORKFLOW_STATUS[WorkflowState(workflow["state"])], workflow.get("ended_at")
        )

    def _parent(self, workflow: WorkflowMessage) -> str:
        """Return the run of a workflow, found by its tags or created with them."""
        key = (workflow["id"], workflow["created_at"])
        if key in self._parents:
            return self._parents[key]
        experiment = self._experiment(f"kvlab/{workflow['name']}")
        tags = workflow_tags(workflow)
        wanted = {name: tags[name] for name in ("kvlab.workflow_id", "kvlab.created_ms")}
        found = next(self._search(experiment, {**wanted, "kvlab.kind": "workflow"}), None)
        run = found or self._connection().create_run(
            experiment,
            start_time=milliseconds(workflow["created_at"]),
            tags=tags,
            run_name=f"{workflow['name']} #{workflow['id']}",
        )
        run_id: str = run.info.run_id
        self._runs[run_id] = {}
        for child in self._search(experiment, {PARENT: run_id}) if found else ():
            if (job_id := child.data.tags.get("kvlab.job_id")) is not None:
                self._runs[run_id][int(job_id)] = child.info.run_id
                self._params[child.info.run_id] = set(child.data.params)
        self._parents[key] = run_id
        return run_id

    def _experiment(self, name: str) -> str:
        if name in self._experiments:
            return self._experiments[name]
        client = self._connection()
        known = client.get_experiment_by_name(name)
        if known is None:
            found = str(client.create_experiment(name, self._artifacts, TRAINING))
        else:
            found = str(known.experiment_id)
            if known.lifecycle_stage == "deleted":
                client.restore_experiment(found)
        self._experiments[name] = found
        return found

    def _run(self, workflow: WorkflowMessage, parent: str, job: JobMessage) -> str | None:
        """Return the run of a job that has begun, creating it with all that never changes."""
        runs = self._runs[parent]
        if job["id"] in runs:
            return runs[job["id"]]
        if JobState(job["state"]) not in STARTED and job.get("started_at") is None:
            return None
        client = self._connection()
        began = job.get("started_at") or job.get("ended_at") or workflow["created_at"]
        run = client.create_run(
            self._experiment(f"kvlab/{workflow['name']}"),
            start_time=milliseconds(began),
            tags={**job_tags(workflow, job), PARENT: parent},
            run_name=job["name"],
        )
        runs[job["id"]] = run.info.run_id
        return runs[job["id"]]

    def _finish(self, workflow: WorkflowMessage, job: JobMessage, run_id: str) -> None:
        from mlflow.entities import Metric, Param, RunTag

        ended = job.get("ended_at")
        # The timestamp must be the same whenever this is sent, or MLflow keeps both.
        stamp = milliseconds(ended if ended is not None else workflow["created_at"])
        done = JobState(job["state"]) is JobState.DONE
        # MLflow refuses to change a parameter, as a newer kvlab's wording of a method would.
        held = self._params.setdefault(run_id, set())
        new = {name: value for name, value in params(job).items() if name not in held}
        self._connection().log_batch(
            run_id,
            params=[Param(name, value) for name, value in new.items()],
            tags=[RunTag(name, value) for name, value in job_tags(workflow, job).items()],
        )
        held.update(new)
        results = [Metric(k, v, stamp, s) for k, v, s in metrics(job)] if done else []
        self._log_metrics(run_id, results)
        self._status(run_id, STATUS[JobState(job["state"])], ended)

    def _log_points(self, parent: str, job_id: int, points: list[PointMessage]) -> None:
        from mlflow.entities import Metric

        run_id = self._runs[parent].get(job_id)
        if run_id is None:
            raise MirrorRefused(
                f"points of job {job_id} came before the job itself: send its row first"
            )
        self._log_metrics(
            run_id,
            [Metric(key_text(p["key"]), p["value"], p["time_ms"], p["step"]) for p in points],
        )

    def _log_metrics(self, run_id: str, found: list[Any]) -> None:
        rest = iter(found)
        while chunk := list(islice(rest, LARGEST_BATCH)):
            self._connection().log_batch(run_id, metrics=chunk)

    def _status(self, run_id: str, status: str, ended: float | None) -> None:
        if status in ENDED:
            end = None if ended is None else milliseconds(ended)
            self._connection().set_terminated(run_id, status, end)
        else:
            self._connection().update_run(run_id, status)

    def _search(self, experiment: str, tags: dict[str, str]) -> Iterator[Any]:
        """Yield every run of an experiment that has these tags, oldest first."""
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        token: str | None = None
        while True:
            page = self._connection().search_runs(
                [experiment], wanted, max_results=1000,
                order_by=["attributes.start_time ASC"], page_token=token,
            )  # fmt: skip
            yield from page
            token = page.token
            if not token:
                return

    def _connection(self) -> MlflowClient:
        if self._client is None:
            import logging

            from mlflow.tracking import MlflowClient

            logging.getLogger("alembic").setLevel(logging.WARNING)
            self._client = MlflowClient(tracking_uri=self._uri)
        return self._client

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what MLflow raises into the two things a sender can act on."""
        try:
            yield
        except MirrorError:
            raise
        except Exception as error:
            # MLflow lets SQLAlchemy's, requests' and its own errors through; all mean "not taken".
            code = getattr(error, "error_code", "")
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            said = shown(f"MLflow at {self._uri}"), shown(first)[:300]
            if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise MirrorRefused(f"{said[0]} refuses: {said[1]}") from error
            self.close()
            raise MirrorUnreachable(
                f"{said[0]} does not answer ({said[1]}); results are safe in the store and will be "
                "sent again"
            ) from error


def _by_job(points: Sequence[PointMessage]) -> dict[int, list[PointMessage]]:
    found: dict[int, list[PointMessage]] = {}
    for point in points:
        found.setdefault(point["job_id"], []).append(point)
    return found
