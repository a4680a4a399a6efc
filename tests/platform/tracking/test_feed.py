"""From the store to MLflow through the feed: nothing lost by a failure, the report at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from kvlab.platform.tracking.mirror import Mirror, MirrorUnreachable


class Unsteady:
    """A real mirror that loses its first `losses` messages with points on the way."""

    def __init__(self, mirror: Mirror, losses: int) -> None:
        self.mirror, self.losses = mirror, losses

    def call(self, message: Message) -> None:
        if message.get("points") and self.losses:
            self.losses -= 1
            # As Ray hands on what an actor raised.
            raise RayTaskError("send", "", MirrorUnreachable("lost on the way"))
        self.mirror.send([message])


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


def test_what_a_failure_lost_is_sent_again_and_the_report_ends_it(
    store: Store, finished: int, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The transport alone is replaced: Ray would carry the same message to the same Mirror.
    monkeypatch.setattr(feed, "_call", lambda mirror, message: mirror.call(message))
    unsteady = Unsteady(Mirror(uri), losses=2)
    stored = store.load(finished)
    fed = Feed(store, stored, Jobs(stored.jobs), lambda: unsteady)
    fed.begin()
    deadline = time.monotonic() + 90
    fed.finish(WorkflowState.DONE, 3.0)
    while fed.behind() and time.monotonic() < deadline:
        fed.finish(WorkflowState.DONE, 3.0)
    fed.close()

    assert unsteady.losses == 0
    assert fed.behind() is None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kvlab/study")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {f"study #{finished}", "base", "q"}
    assert len(client.get_metric_history(runs["base"].info.run_id, "loss")) == 40
    parent = runs[f"study #{finished}"]
    assert parent.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["report.html"]
