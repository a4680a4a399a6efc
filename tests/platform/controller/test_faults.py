"""Kills on the real thing: whatever dies, and when, `resume` ends with the same rows."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from mlflow.tracking import MlflowClient

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.launch import mirror_of
from kvlab.platform.controller.pool import NAMESPACE
from kvlab.platform.record.fault import POINTS

pytestmark = pytest.mark.ray

DRIVE = Path(__file__).with_name("drive.py")
STEPS = 12
IN_WORKER = ("checkpoint", "publish", "spool")
SEEDS = range(int(os.environ.get("KVLAB_RANDOM_KILLS", "1")))
LONGEST = 2.5
"""Seconds after the first start within which a random kill falls: what the workflow takes."""
MIRRORED = 5
"""Of so many seeds one runs with the MLflow mirror, whose import takes seconds."""

YAML = f"""
version: 1
name: killed
jobs:
  a: {{noop: {{points: {STEPS}, checkpoints: 3, sleep: 0.9}}}}
  quick: {{noop: {{points: 2}}}}
  b: {{noop: {{points: {STEPS}, checkpoints: 3, sleep: 0.8}}, needs: [a]}}
  c: {{noop: {{points: 2, sleep: 0.01}}, needs: [a, quick]}}
"""
"""No two jobs alike: of those one would be run and the other reuse its result."""
KVLAB = [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()"]


@pytest.fixture
def workflow(submit, cell):
    """Jobs that log, checkpoint, publish and need each other: about two seconds in all."""
    long = {"points": STEPS, "checkpoints": 3, "sleep": 0.9, "publish": True}
    retries = {Cause.NODE_LOST: 3}
    return submit(
        cell("a", retries=retries, **long),
        cell("quick", points=2, retries=retries),
        cell("b", "a", retries=retries, **long),
        cell("c", "a", "quick", points=2, retries=retries),
    )


@pytest.fixture
def drive(cluster, home, workflow):
    """Start the workflow's controller in another process."""

    def start(**environment):
        return subprocess.Popen(
            [sys.executable, str(DRIVE), str(home.root), home.url, str(workflow), cluster],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(jobs):
    return {job.job: job.attempt for job in jobs if job.state is JobState.DONE}


@pytest.fixture
def check(store, home):
    """The workflow is done, as if nothing had happened."""

    def look(workflow, before=(), mirrored=False, published=("a", "b")):
        stored = store.load(workflow)
        assert stored.row.state is WorkflowState.DONE
        jobs = {job.job: job for job in stored.jobs}
        for name, points in (("a", STEPS), ("b", STEPS), ("quick", 2), ("c", 2)):
            job = jobs[name]
            assert job.state is JobState.DONE
            assert job.result["points"] == points
            found = [(point.step, point.value) for point in store.points(job.id)]
            assert found == [(step, step - 1.0) for step in range(1, points + 1)]
            assert sum(attempt.cause is Cause.DONE for attempt in job.attempts) == 1
            assert all(attempt.ended_at is not None for attempt in job.attempts)
        for name, attempts in dict(before).items():
            assert jobs[name].attempt == attempts, f"{name} was finished and ran again"
        for name in published:
            assert json.loads((home.artifact(f"identity-of-{name}") / "noop.json").read_text())
        for folder in ("spool", "work", "checkpoints"):
            assert list((home.root / folder).iterdir()) == [], folder
        if mirrored:
            assert in_mlflow(home) == {
                job.name: [(p.step, p.value, p.time_ms) for p in store.points(job.id)]
                for job in stored.jobs
            }

    return look


def in_mlflow(home):
    """Every point that MLflow holds, doubles included: job -> [(step, value, time in ms)]."""
    client = MlflowClient(tracking_uri=home.tracking_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return {
        run.info.run_name: sorted(
            (point.step, point.value, point.timestamp)
            for point in client.get_metric_history(run.info.run_id, "value")
        )
        for run in client.search_runs(experiments)
        if "kvlab.job_id" in run.data.tags
    }


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory):
    """An MLflow database without runs: its tables take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture
def mirrored(seed, home, mlflow_tables):
    """Whether this seed's run is mirrored."""
    if seed % MIRRORED:
        return False
    shutil.copy(mlflow_tables, home.root / "mlflow.db")
    return True


def points_of(store, workflow):
    """What the store has acknowledged: job -> its points' keys and steps."""
    return {
        job.id: {(point.key, point.step) for point in store.points(job.id)}
        for job in store.load(workflow).jobs
    }


def in_mirror(store, workflow):
    return all(job.mirrored_state is job.state for job in store.load(workflow).jobs)


def at_random_instant(seed, process, store, workflow):
    """Wait for the seed's instant after the first job's start, or the end if that is earlier."""
    end = time.monotonic() + 60.0
    while not (began := started(store, workflow)) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert began, process.communicate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(random.Random(seed).uniform(0.0, LONGEST))


def started(store, workflow):
    """Whether a job has begun; the workflow may not be stored yet."""
    if not store.workflows():
        return False
    return any(job.attempt for job in store.status(workflow).jobs)


def resume(home, store, workflow, pool, mirrored=False):
    """Go on as another process would: from SQL and the home alone."""
    acknowledged = points_of(store, workflow)
    actor = mirror_of(home)() if mirrored else None
    if actor is not None:
        ray.get(actor.send.remote([]))  # it imports MLflow, once
    Controller(home, store, workflow, pool=pool, mirror=(lambda: actor) if mirrored else None).run()
    assert not mirrored or in_mirror(store, workflow)
    after = points_of(store, workflow)
    assert all(points <= after[job] for job, points in acknowledged.items())


@pytest.mark.parametrize("point", [p for p in POINTS if not p.startswith(IN_WORKER)])
def test_the_controller_dies_at(point, drive, check, home, store, workflow, pool):
    # Not the first time it is passed, so that there is something to lose.
    count = 1 if point.startswith("finish") else 2
    process = drive(KVLAB_FAULT=f"{point}:{count}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    before = finished(store.load(workflow).jobs)
    resume(home, store, workflow, pool)
    check(workflow, before)


@pytest.mark.parametrize("point", [p for p in POINTS if p.startswith(IN_WORKER)])
def test_a_worker_dies_at(point, drive, check, workflow, tmp_path):
    mark = tmp_path / "mark"
    process = drive(KVLAB_FAULT=point, KVLAB_FAULT_MARK=str(mark))
    out, errors = process.communicate(timeout=60)
    assert mark.exists()
    assert json.loads(out.splitlines()[-1]) == {"state": "done"}, errors
    check(workflow)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_controller_dies_at_any_instant(
    seed, mirrored, drive, check, home, store, workflow, pool
):
    process = drive(**({"DRIVE_MIRROR": "1"} if mirrored else {}))
    at_random_instant(seed, process, store, workflow)
    process.kill()
    process.communicate()
    before = finished(store.load(workflow).jobs)
    resume(home, store, workflow, pool, mirrored)
    check(workflow, before, mirrored)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_worker_dies_at_any_instant(seed, mirrored, drive, check, home, store, workflow, pool):
    process = drive(**({"DRIVE_MIRROR": "1"} if mirrored else {}))
    at_random_instant(seed, process, store, workflow)
    before = finished(store.load(workflow).jobs)
    kill_a_worker(process, store, workflow)
    out, errors = process.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == {"state": "done"}, errors
    if mirrored:
        resume(home, store, workflow, pool, mirrored)
    check(workflow, before, mirrored)


def kill_a_worker(process, store, workflow):
    """Kill a worker that has a job now, or gets the next one; none if the workflow is over."""
    while process.poll() is None:
        running = [job for job in store.load(workflow).jobs if job.state is JobState.RUNNING]
        for job in running:
            with suppress(ValueError, ray.exceptions.RayError):  # it ended just now
                worker = ray.get_actor(job.attempts[-1].worker, NAMESPACE)
                os.kill(ray.get(worker.hello.remote(), timeout=10).pid, signal.SIGKILL)
                return
        time.sleep(0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_driver_dies_at_any_instant(seed, mirrored, check, home, store, tmp_path):
    """The whole command with its Ray, as a person starts it; then `kvlab resume`."""
    (tmp_path / "killed.yaml").write_text(YAML)
    flag = "--mlflow" if mirrored else "--no-mlflow"
    words = ["--json", "--cpus", "2", flag]
    process = begin(home, tmp_path, "run", "killed.yaml", *words)
    at_random_instant(seed, process, store, 1)
    process.kill()
    process.communicate()
    before, acknowledged = finished(store.load(1).jobs), points_of(store, 1)
    end = time.monotonic() + 150.0
    while time.monotonic() < end:
        process = begin(home, tmp_path, "resume", *words)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        if not mirrored or in_mirror(store, 1):
            break
    after = points_of(store, 1)
    assert all(points <= after[job] for job, points in acknowledged.items())
    check(1, before, mirrored, published=())


def begin(home, folder, *words):
    """Start `kvlab ...`."""
    return subprocess.Popen(
        [*KVLAB, *words],
        cwd=folder,
        env={**os.environ, "KVLAB_HOME": str(home.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
