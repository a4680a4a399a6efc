"""The mirror: MLflow may be down, catches up later, and gets every point once."""

from __future__ import annotations

import threading
import time

import pytest
import ray
from mlflow.tracking import MlflowClient

from kvlab.db.rows import NewJob
from kvlab.db.states import WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.local import local_ray
from kvlab.platform.home import Home
from kvlab.platform.record import feed
from kvlab.platform.tracking.mirror import Mirror

pytestmark = pytest.mark.ray

STEPS = 20


@pytest.fixture
def home(tmp_path):
    found = Home.find(tmp_path / "home", f"sqlite:///{tmp_path}/home/kvlab.db")
    found.create()
    return found


def points(client, workflow):
    """Every point of every job that MLflow holds: name -> [(step, value)]."""
    experiment = client.get_experiment_by_name("kvlab/mirrored")
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.info.run_name: sorted(
            (point.step, point.value)
            for point in client.get_metric_history(run.info.run_id, "value")
        )
        for run in runs
        if "kvlab.job_id" in run.data.tags
    }


class Silent:
    """An actor that takes messages and never answers."""

    def send(self, batch):
        threading.Event().wait()


def test_a_mirror_that_never_answers_does_not_outlive_its_controller(home, monkeypatch):
    monkeypatch.setattr(feed, "FINISH_SECONDS", 0.5)
    jobs = [NewJob("a", "a", "noop", {"sleep": 0, "points": 1, "fail": None}, {}, {}, (), "a", {})]
    with local_ray(1), Store.open(home.url) as store:
        actor = ray.remote(num_cpus=0)(Silent)
        number = store.create_workflow("silent", "", {}, jobs, time.time())
        outcome = Controller(home, store, number, mirror=actor.remote).run()
        assert outcome.state is WorkflowState.DONE
        assert "MLflow lacks 1 jobs" in outcome.mirror
        # Ray would end this process if it were still waiting.
        assert "mirror" not in {thread.name for thread in threading.enumerate()}


def test_mlflow_down_then_up_then_again(home, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    spec = {"sleep": 0.2, "points": STEPS, "checkpoints": 5, "fail": None}
    jobs = [NewJob(name, name, "noop", spec, {}, {}, (), name, {}) for name in ("a", "b")]
    with local_ray(2), Store.open(home.url) as store:
        actor = ray.remote(num_cpus=0)(Mirror)
        number = store.create_workflow("mirrored", "", {}, jobs, time.time())

        down = Controller(home, store, number, mirror=lambda: actor.remote("http://127.0.0.1:9"))
        outcome = down.run()
        assert outcome.state is WorkflowState.DONE
        assert "MLflow lacks 2 jobs" in outcome.mirror
        assert f"kvlab resume {number}" in outcome.mirror
        assert {job.mirrored_state for job in store.load(number).jobs} == {None}

        monkeypatch.setattr(feed, "FINISH_SECONDS", 120.0)
        expected = {name: [(step, step - 1.0) for step in range(1, STEPS + 1)] for name in "ab"}
        for _ in range(2):
            mirror = actor.remote(uri)
            ray.get(mirror.send.remote([]))  # MLflow makes its tables: seconds, once
            up = Controller(home, store, number, mirror=lambda mirror=mirror: mirror)
            assert up.run().mirror is None
            assert points(MlflowClient(tracking_uri=uri), number) == expected
        assert {job.mirrored_step for job in store.load(number).jobs} == {STEPS}
