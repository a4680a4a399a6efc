"""From the store to MLflow through the feed: nothing lost by a failure, the report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from ray.exceptions import RayTaskError

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.record import feed
from kvlab.platform.record.feed import Feed
from kvlab.platform.tracking.messages import Message
from kvlab.platform.tracking.mirror import Mirror, MirrorError, MirrorUnreachable


class Unsteady:
    """A real mirror that loses its first `losses` messages with points on the way."""

    def __init__(self, mirror: Mirror, losses: int) -> None:
        self.mirror, self.losses = mirror, losses
        self.messages: list[Message] = []

    def call(self, message: Message) -> None:
        self.messages.append(message)
        if message.get("points") and self.losses:
            self.losses -= 1
            # As Ray hands on what an actor raised.
            raise RayTaskError("send", "", MirrorUnreachable("lost on the way"))
        try:
            self.mirror.send([message])
        except MirrorError as error:
            raise RayTaskError("send", "", error) from error


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as opened:
        yield opened


@pytest.fixture
def finished(store: Store) -> int:
    """A workflow of one measured model whose training logged 40 points."""
    spec: dict[str, Any] = {"method": {}, "model": {"config": {"width": 8}}}
    jobs = [
        NewJob("base", "base", "train", spec, {"seed": 0}, {}, (), "a", {}),
        NewJob("q", "q", "evaluate", {"apply": {}}, {"seed": 0}, {"of": "base"}, (), "b", {}),
    ]
    wid = store.create_workflow("study", "version: 1\n", {"baseline": "base"}, jobs, 1.0)
    lease = store.claim(wid, "test", 99.0, 1.0)
    base, quality = (row.id for row in store.load(wid).jobs)
    with store.batch(lease, 2.0) as batch:
        attempt = batch.start(base, "worker")
        batch.points(base, attempt, [("loss", step, 5.0, 2000 + step) for step in range(40)])
        trained = {"loss": 3.0, "flops": 1.0, "seconds": 1.0}
        batch.end(base, attempt, Cause.DONE, JobState.DONE, result=trained)
        batch.move(quality, JobState.QUEUED)
        attempt = batch.start(quality, "worker")
        scored = {
            "perplexity": 20.0,
            "loss": 3.0,
            "targets": {"hash": "aa", "count": 9, "first_target": 1},
        }
        batch.end(quality, attempt, Cause.DONE, JobState.DONE, result=scored)
    return wid


@pytest.fixture
def sent(store: Store, uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Unsteady]:
    """sent(workflow, state, losses) feeds a workflow as it stands until MLflow lacks nothing."""
    # The transport alone is replaced: Ray would carry the same message to the same Mirror.
    monkeypatch.setattr(feed, "_call", lambda mirror, message: mirror.call(message))

    def send(workflow: int, state: WorkflowState, losses: int = 0) -> Unsteady:
        unsteady = Unsteady(Mirror(uri), losses)
        stored = store.load(workflow)
        fed = Feed(store, stored, Jobs(stored.jobs), lambda: unsteady)
        fed.begin()
        deadline = time.monotonic() + 90
        fed.finish(state, 3.0)
        while fed.behind() and time.monotonic() < deadline:
            fed.finish(state, 3.0)
        fed.close()
        assert fed.behind() is None
        lease = store.claim(workflow, "feed", 99.0, 1e6)
        with store.batch(lease, 1e6) as batch:
            for mark in fed.marks():
                mark(batch)
        store.release(lease, state, 1e6)
        return unsteady

    return send


def runs_of(uri: str) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kvlab/study")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def history(uri: str, run: Any, key: str) -> list[tuple[int, float, int]]:
    found = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in found)


def test_what_a_failure_lost_is_sent_again_and_the_report_ends_it(
    finished: int, uri: str, sent: Callable[..., Unsteady]
) -> None:
    assert sent(finished, WorkflowState.DONE, losses=2).losses == 0
    runs = runs_of(uri)
    assert runs.keys() == {f"study #{finished}", "base", "q"}
    assert len(history(uri, runs["base"], "loss")) == 40
    parent = runs[f"study #{finished}"]
    assert parent.info.status == "FINISHED"
    files = MlflowClient(tracking_uri=uri).list_artifacts(parent.info.run_id)
    assert [file.path for file in files] == ["report.html"]


@pytest.mark.parametrize(
    ("cause", "state"),
    [(Cause.DIVERGED, JobState.FAILED), (Cause.CANCELLED, JobState.CANCELLED)],
)
def test_a_resumed_job_has_the_same_points_in_both_stores(
    store: Store, uri: str, sent: Callable[..., Unsteady], cause: Cause, state: JobState
) -> None:
    """A first attempt beyond its checkpoint ends; the second logs those steps with other values."""
    wid = store.create_workflow(
        "study", "", {}, [NewJob("base", "base", "train", {}, {}, {}, (), "a", {})], 1.0
    )
    lease = store.claim(wid, "test", 9.0, 1.0)
    (base,) = (row.id for row in store.load(wid).jobs)
    with store.batch(lease, 2.0) as batch:
        attempt = batch.start(base, "worker")
        batch.points(base, attempt, [("loss", step, 1.0, 2000 + step) for step in range(1, 11)])
        batch.checkpoint(base, attempt, 5, "folder")
        batch.end(base, attempt, cause, state, message="as asked")
    store.release(lease, WorkflowState(state.value), 3.0)
    sent(wid, WorkflowState(state.value))

    lease = store.claim(wid, "test", 99.0, 2e6)
    with store.batch(lease, 2e6) as batch:
        if state is JobState.CANCELLED:
            batch.move(base, JobState.WAITING)
        batch.move(base, JobState.QUEUED)
        attempt = batch.start(base, "worker")
        batch.rewind(base, attempt, 5)
        batch.points(base, attempt, [("loss", step, 2.0, 9000 + step) for step in range(6, 13)])
        batch.end(base, attempt, Cause.DONE, JobState.DONE, result={"loss": 2.0})
    store.release(lease, WorkflowState.DONE, 2e6)
    sent(wid, WorkflowState.DONE)

    stored = [(point.step, point.value, point.time_ms) for point in store.points(base)]
    assert [step for step, _, _ in stored] == list(range(1, 13))
    assert history(uri, runs_of(uri)["base"], "loss") == stored


def test_a_backlog_is_sent_in_pieces_each_marked_when_it_arrived(
    store: Store, uri: str, sent: Callable[..., Unsteady], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "JOBS", 3)
    names = [f"j{number}" for number in range(8)]
    jobs = [NewJob(name, name, "evaluate", {}, {}, {}, (), name, {}) for name in names]
    wid = store.create_workflow("study", "", {}, jobs, 1.0)
    lease = store.claim(wid, "test", 9.0, 1.0)
    result = {"perplexity": 2.0, "window_losses": [1.0] * 50, "window_targets": [1] * 50}
    with store.batch(lease, 2.0) as batch:
        for row in store.load(wid).jobs:
            attempt = batch.start(row.id, "worker")
            if row.name == "j4":
                batch.points(row.id, attempt, [("loss", 1, 1.0, 2000)])
            batch.end(row.id, attempt, Cause.DONE, JobState.DONE, result=result)
    store.release(lease, WorkflowState.DONE, 3.0)

    found = sent(wid, WorkflowState.DONE, losses=1).messages
    told = [tuple(job["name"] for job in message["jobs"]) for message in found]
    # The second piece was lost once; the first is not sent again.
    assert told[:3] == [tuple(names[:3]), tuple(names[3:6]), tuple(names[3:6])]
    assert told[3] == tuple(names[6:])
    assert [message["workflow"]["state"] for message in found[:4]] == ["running"] * 3 + ["done"]
    assert all("window_losses" not in job["result"] for one in found for job in one["jobs"])
    assert {row.mirrored_state for row in store.load(wid).jobs} == {JobState.DONE}
    assert runs_of(uri).keys() == {f"study #{wid}", *names}
