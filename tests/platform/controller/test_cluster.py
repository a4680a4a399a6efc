"""A detached controller on a Ray cluster of its own: it may die, its workers go on."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest

from kvlab.db.errors import NoStore, NotFound
from kvlab.db.states import JobState, WorkflowState
from kvlab.db.store import Store

pytestmark = pytest.mark.ray

YAML = """
version: 1
name: far
seeds: [0]
jobs:
  long: {noop: {sleep: 12, points: 60, checkpoints: 5}}
  next: {noop: {points: 2}, needs: [long]}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A cluster that wants a token, as `ray start` makes one."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    port = free_port()
    words = f"--head --block --port {port} --ray-client-server-port {free_port()} --num-cpus 2"
    with open(tmp_path / "ray.log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", *words.split(),
                "--node-ip-address", "127.0.0.1", "--include-dashboard", "false",
                "--object-store-memory", str(100 << 20), "--disable-usage-stats",
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 60.0
    while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
        assert process.poll() is None, (tmp_path / "ray.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def kvlab(tmp_path):
    """Run `kvlab ...` to its end; return its output."""
    (tmp_path / "far.yaml").write_text(YAML)

    def go(*words, code=0, **environment):
        ended = subprocess.run(
            [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()", *words],
            cwd=tmp_path,
            env={**os.environ, "KVLAB_HOME": str(tmp_path / "home"), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    return go


def stored(tmp_path):
    try:
        with Store.open(f"sqlite:///{tmp_path}/home/kvlab.db", read_only=True) as store:
            return store.load(1)
    except (NoStore, NotFound):
        return None


def test_a_dead_controllers_worker_is_adopted(address, kvlab, tmp_path):
    out = kvlab("run", "far.yaml", "--address", address, "--detach", "--no-mlflow", "--json")
    assert json.loads(out.splitlines()[-1]) == {"workflow": 1, "state": "running"}
    end = time.monotonic() + 60.0
    while stored(tmp_path).jobs[0].checkpoint is None:
        assert time.monotonic() < end
        time.sleep(0.1)
    controller = int(stored(tmp_path).row.owner.split(":")[1])
    os.kill(controller, signal.SIGKILL)
    before = stored(tmp_path)
    assert before.jobs[0].state is JobState.RUNNING

    kvlab("resume", "--address", address, "--no-mlflow", "--json")
    after = stored(tmp_path)
    assert after.row.state is WorkflowState.DONE
    # The same attempt, on the same worker, went on: nothing was lost with the controller.
    assert [attempt.number for attempt in after.jobs[0].attempts] == [1]
    assert after.jobs[0].result["started_from"] == 0
    with Store.open(f"sqlite:///{tmp_path}/home/kvlab.db", read_only=True) as store:
        assert [point.step for point in store.points(after.jobs[0].id)] == list(range(1, 61))


def test_who_has_no_token_or_no_cluster_is_told(kvlab):
    elsewhere = ("run", "far.yaml", "--address", "192.0.2.1:6379")
    said = kvlab(*elsewhere, code=2, RAY_AUTH_MODE="disabled")
    assert "RAY_AUTH_MODE=token" in said
    assert len(said.splitlines()) == 1
