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
from contextlib import contextmanager, suppress

import pytest
import ray

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


@contextmanager
def cluster(tmp_path, ip):
    """A cluster as `ray start` makes one in this environment; its port."""
    port = free_port()
    words = f"--head --block --port {port} --ray-client-server-port {free_port()} --num-cpus 2"
    with open(tmp_path / "ray.log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", *words.split(),
                "--node-ip-address", ip, "--include-dashboard", "false",
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
    yield port
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):  # it waits for detached actors
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A cluster that wants a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with cluster(tmp_path, "127.0.0.1") as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def begin(tmp_path):
    """Start `kvlab ...`."""
    (tmp_path / "far.yaml").write_text(YAML)

    def go(*words, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()", *words],
            cwd=tmp_path,
            env={**os.environ, "KVLAB_HOME": str(tmp_path / "home"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return go


@pytest.fixture
def kvlab(begin):
    """Run `kvlab ...` to its end; return its output."""

    def go(*words, code=0, **environment):
        return ended(begin(*words, **environment), code)

    return go


def ended(process, code=0):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == code, out + errors
    return out if code == 0 else errors


def await_checkpoint(tmp_path):
    end = time.monotonic() + 60.0
    while stored(tmp_path) is None or stored(tmp_path).jobs[0].checkpoint is None:
        assert time.monotonic() < end
        time.sleep(0.1)


def lose_controller(tmp_path):
    os.kill(int(stored(tmp_path).row.owner.split(":")[1]), signal.SIGKILL)


def stored(tmp_path):
    try:
        with Store.open(f"sqlite:///{tmp_path}/home/kvlab.db", read_only=True) as store:
            return store.load(1)
    except (NoStore, NotFound):
        return None


def test_a_dead_controllers_worker_is_adopted(address, kvlab, tmp_path):
    out = kvlab("run", "far.yaml", "--address", address, "--detach", "--no-mlflow", "--json")
    assert json.loads(out.splitlines()[-1]) == {"workflow": 1, "state": "running"}
    await_checkpoint(tmp_path)
    lose_controller(tmp_path)
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


def test_cancelling_ends_what_a_dead_controller_left(address, begin, kvlab, tmp_path):
    (tmp_path / "far.yaml").write_text(YAML.replace("sleep: 12", "sleep: 120"))
    watching = begin("run", "far.yaml", "--address", address, "--no-mlflow")
    await_checkpoint(tmp_path)
    # What the controller on the cluster raises is said here in one line, too.
    said = kvlab("resume", "--address", address, "--no-mlflow", code=2)
    assert said.startswith("workflow 1 'far' is running (host ")
    assert len(said.splitlines()) == 1
    lose_controller(tmp_path)
    said = ended(watching, code=2)
    assert "the controller of workflow 1 is gone" in said
    assert len(said.splitlines()) == 1
    assert kvlab("cancel", "far", "--address", address) == "workflow 1 cancelled\n"
    assert {job.state for job in stored(tmp_path).jobs} == {JobState.CANCELLED}
    look = "import ray, sys; ray.init(sys.argv[1]); print(ray.util.list_named_actors(True))"
    names = subprocess.run(
        [sys.executable, "-c", look, address], capture_output=True, text=True, check=True
    )
    assert "worker-" not in names.stdout


def test_a_cluster_without_a_token_is_refused_whatever_is_set_here(kvlab, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ip = ray.util.get_node_ip_address()
    if ip.startswith("127."):
        pytest.fail("this machine has no address but loopback")
    with cluster(tmp_path, ip) as port:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        for address, environment in ((f"{ip}:{port}", token), (f"localhost:{port}", {})):
            said = kvlab("run", "far.yaml", "--address", address, code=2, **environment)
            assert "answers without the right token" in said
            assert len(said.splitlines()) == 1
    assert stored(tmp_path) is None
