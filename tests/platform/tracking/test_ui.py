"""`kvlab ui`: MLflow's real server on a real store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvlab.platform.tracking.mirror import Mirror
from kvlab.platform.tracking.ui import UiError, serve


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    return found


@pytest.fixture
def served(uri: str, tmp_path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`kvlab ui` in a process of its own, on a store with one workflow and its report."""
    Mirror(uri).send(
        [
            {
                "workflow": {"id": 1, "name": "study", "state": "done", "created_at": 5.0},
                "report": "<p>compared</p>",
            }
        ]
    )
    code = "from kvlab.platform.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "ui", "--port", str(port)],
        env={**os.environ, "KVLAB_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have made all below deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    yield process
    process.kill()
    process.wait()


def ask(port: int, path: str, body: dict[str, object] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def test_the_store_is_shown_and_ctrl_c_ends_it(
    served: subprocess.Popen[str], port: int, tmp_path: Path
) -> None:
    assert served.stdout is not None
    line = served.stdout.readline()
    assert line == f"MLflow is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
    found = json.loads(ask(port, "/api/2.0/mlflow/experiments/search", {"max_results": 10}))
    names = {e["name"]: e["experiment_id"] for e in found["experiments"]}
    runs = json.loads(
        ask(port, "/api/2.0/mlflow/runs/search", {"experiment_ids": [names["kvlab/study"]]})
    )
    run = runs["runs"][0]["info"]["run_id"]
    assert ask(port, f"/get-artifact?path=report.html&run_id={run}") == "<p>compared</p>"
    served.send_signal(signal.SIGINT)
    assert served.wait(90) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlflow-artifacts", "mlflow.db"]


def test_without_a_store_it_refuses(tmp_path: Path, port: int) -> None:
    with pytest.raises(UiError, match=r"no MLflow store at .*mlflow\.db yet: `kvlab run FILE`"):
        serve(f"sqlite:///{tmp_path / 'mlflow.db'}", port, print)
    assert not list(tmp_path.iterdir())


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UiError, match=f"port {port} cannot be used"):
            serve(f"sqlite:///{tmp_path / 'mlflow.db'}", port, print)


def test_a_server_that_runs_elsewhere_is_named_without_its_password(port: int) -> None:
    with pytest.raises(UiError, match="http://…@host already"):
        serve("http://me:secret@host", port, print)
