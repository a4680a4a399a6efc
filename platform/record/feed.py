"""Feeds the MLflow mirror from SQL, from a thread of its own: MLflow never slows a job down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayTaskError

from kvlab.db.batches import Batch
from kvlab.db.rows import Workflow
from kvlab.db.states import JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.compare import report_of
from kvlab.platform.tracking.messages import JobMessage, Message, PointMessage, WorkflowMessage

if TYPE_CHECKING:
    from kvlab.platform.controller.jobs import Jobs

MakeMirror = Callable[[], Any]
"""Returns the handle of a `kvlab.platform.tracking.mirror.Mirror` actor."""

Mark = Callable[[Batch], None]

EVERY_SECONDS = 1.0
SEND_SECONDS = 60.0
FINISH_SECONDS = 15.0
RETRY_SECONDS = 30.0
LEAVE_SECONDS = 1.0
POINTS = 5_000
"""Points that one message holds at most."""
JOBS = 100
"""Jobs that one message holds at most: MLflow takes some 30 a second."""


class Feed:
    """Sends jobs as they change, and their points once they are final.

    A point is final when a visible checkpoint covers it, or its job is done: one that failed or was
    cancelled goes on from its checkpoint when it is resumed. What MLflow holds is
    marked in SQL, so a later controller goes on from there. With `make` None it does nothing.
    """

    def __init__(self, store: Store, stored: Workflow, jobs: Jobs, make: MakeMirror | None) -> None:
        self._store = store
        self._jobs = jobs
        self._make = make
        self._workflow: WorkflowMessage = {
            "id": stored.row.id,
            "name": stored.row.name,
            "state": WorkflowState.RUNNING,
            "created_at": stored.row.created_at,
            "text": stored.text,
        }
        self._held = {row.id: (row.mirrored_state, row.mirrored_step) for row in stored.jobs}
        self._changed = threading.Condition()
        self._pending: set[int] = set()
        self._sending: set[int] = set()
        self._workflow_pending = True
        self._marks: list[Mark] = []
        self._error: str | None = None
        self._mirror: Any = None
        self._urgent = self._held_back = self._closed = self._gave_up = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def begin(self) -> None:
        """Start sending, beginning with what MLflow lacks of earlier runs."""
        fresh = (JobState.WAITING, JobState.QUEUED)
        for row in self._jobs.rows.values():
            held = self._held[row.id][0]
            if row.state is not held and not (held is None and row.state in fresh):
                self._jobs.changed.add(row.id)
        if self._make is not None:
            self._thread.start()

    def offer(self) -> None:
        """Take note of the jobs that changed; called after every commit."""
        changed = self._jobs.changed
        if not changed:
            return
        if self._make is not None:
            with self._changed:
                self._pending |= changed
        changed.clear()

    def marks(self) -> list[Mark]:
        """Rows that say what MLflow holds by now, to be stored."""
        with self._changed:
            marks, self._marks = self._marks, []
        return marks

    def hold_back(self, hold: bool) -> None:
        """Send nothing while something is being measured: MLflow takes a whole core at times."""
        self._held_back = hold

    def finish(self, state: WorkflowState, now: float) -> None:
        """Say how the workflow ended, and wait a while until all is sent."""
        if self._make is None:
            return
        self.offer()
        with self._changed:
            self._workflow["state"] = state
            self._workflow["ended_at"] = now
            self._workflow_pending = self._urgent = True
            self._gave_up = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._gave_up or not self._owing(), FINISH_SECONDS)

    def behind(self) -> str | None:
        """One line about what MLflow lacks, or None."""
        with self._changed:
            if self._make is None or not self._owing():
                return None
            count, why = len(self._pending | self._sending), self._error or "slow"
        return (
            f"MLflow lacks {count} jobs ({why}): `kvlab resume {self._workflow['id']}` "
            "brings it up to date"
        )

    def close(self) -> None:
        """Stop sending. Ray may be shut down afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)
        if self._thread.is_alive():
            # Ray ends the process when a thread still waits for an answer as it is shut down.
            _end(self._mirror)
            self._thread.join(SEND_SECONDS)

    def _owing(self) -> bool:
        return bool(self._pending or self._sending or self._workflow_pending)

    def _run(self) -> None:
        assert self._make is not None
        pause = EVERY_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._urgent, pause)
                if self._closed:
                    return
                if self._held_back and not self._urgent:
                    continue
                workflow, jobs, told = self._take()
                more, last = bool(self._pending), self._urgent
                self._urgent &= more
            if not (jobs or told):
                pause = EVERY_SECONDS
                continue
            marks: list[Mark] = []
            try:
                self._mirror = self._mirror or self._make()
                marks = self._send(self._mirror, workflow, jobs)
                pause = 0.0 if more else EVERY_SECONDS
            except Exception as error:  # whatever MLflow or its actor may raise: it is a mirror
                if not isinstance(error, RayTaskError):
                    _end(self._mirror)
                    self._mirror = None
                with self._changed:
                    self._pending |= self._sending
                    self._workflow_pending |= told
                    self._error = _reason(error)
                    self._gave_up, self._urgent = last, False
                pause = min(2 * max(pause, EVERY_SECONDS), RETRY_SECONDS)
            with self._changed:
                self._marks += marks
                self._sending = set()
                self._changed.notify_all()

    def _take(self) -> tuple[WorkflowMessage, list[int], bool]:
        """The next message's workflow and jobs, and whether it says all about the workflow."""
        jobs, workflow = sorted(self._pending)[:JOBS], self._workflow.copy()
        self._sending = set(jobs)
        self._pending -= self._sending
        if self._pending:  # how the workflow ended is said with the last of its jobs
            workflow["state"] = WorkflowState.RUNNING
            workflow.pop("ended_at", None)
            return workflow, jobs, False
        told, self._workflow_pending = self._workflow_pending, False
        return workflow, jobs, told

    def _send(self, mirror: Any, workflow: WorkflowMessage, jobs: list[int]) -> list[Mark]:
        """Send one message, more where there are many points; return what MLflow then holds."""
        sent: list[tuple[int, JobState, int | None]] = []
        message: Message = {"workflow": workflow, "jobs": [], "points": []}
        for job in jobs:
            row = self._message(job)
            step = None
            message["jobs"].append(row)
            for point in self._final(job, JobState(row["state"])):
                message["points"].append(point)
                step = point["step"] if step is None else max(step, point["step"])
                if len(message["points"]) >= POINTS:
                    _call(mirror, message)
                    message = {"workflow": workflow, "jobs": [row], "points": []}
            sent.append((job, JobState(row["state"]), step))
        _call(mirror, message)
        # Only now: what a failed call lost has to be sent again.
        marks = [self._mark(*held) for held in sent]
        if (state := workflow["state"]) != WorkflowState.RUNNING:
            report = report_of(self._store, workflow["id"], WorkflowState(state))
            if report is not None:
                _call(mirror, {"workflow": workflow, "report": report})
        return marks

    def _sent(self, job: int) -> tuple[JobState | None, int | None]:
        """What MLflow holds of a job; of one that came later nothing."""
        return self._held.get(job, (None, None))

    def _mark(self, job: int, state: JobState, step: int | None) -> Mark:
        held = self._sent(job)[1]
        self._held[job] = (state, held if step is None else step)
        return lambda batch: batch.mirrored(job, step=step, state=state)

    def _final(self, job: int, state: JobState) -> Iterator[PointMessage]:
        """The job's points that will not change any more and MLflow does not hold."""
        upto = None
        if state is not JobState.DONE:
            visible = self._jobs.checkpoints.get(job)
            if visible is None:
                return
            upto = visible[0]
        rows = self._store.points(job, after_step=self._sent(job)[1], up_to_step=upto)
        for point in rows:
            yield {
                "job_id": job,
                "key": point.key,
                "step": point.step,
                "value": point.value,
                "time_ms": point.time_ms,
            }

    def _message(self, job: int) -> JobMessage:
        row = self._jobs[job]
        message: dict[str, Any] = {
            "started_at": row.started_at,
            "ended_at": row.ended_at,
            "cause": row.cause,
            "message": row.message,
            "result": row.result,
            "reused_from": row.reused_from,
            "state": row.state,
            **self._jobs.facts.get(job, {}),
            "id": job,
            "model": self._jobs.model(job),
        }
        if message["result"]:
            # A number for every window of text: for the store, MLflow has no use for them.
            message["result"] = {
                name: value
                for name, value in message["result"].items()
                if not name.startswith("window_")
            }
        for name in ("name", "job", "kind", "identity", "axes", "spec"):
            message[name] = getattr(row, name)
        return cast(JobMessage, message)


def _reason(error: Exception) -> str:
    """What went wrong, without the remote traceback that Ray adds."""
    return " ".join(str(getattr(error, "cause", None) or error).split())[:200]


def _end(mirror: Any) -> None:
    """Kill an actor that is dead or hangs."""
    if mirror is not None:
        ray.kill(mirror)


def _call(mirror: Any, message: Message) -> None:
    ray.get(mirror.send.remote([message]), timeout=SEND_SECONDS)
