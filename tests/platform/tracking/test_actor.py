"""The mirror as `kvlab run` uses it: an actor of its own on a real Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.ray

YAML = """
version: 1
name: points
seeds: [0, 1]
jobs:
  logs: {noop: {points: 1200}}
  bad: {noop: {fail: user}}
"""

# The command itself, then what its process had to import for it.
RUN = """
import json, sys
from kvlab.platform.cli.main import main
try:
    main()
finally:
    heavy = [name for name in ("mlflow", "pandas", "torch") if name in sys.modules]
    print(json.dumps(heavy), file=sys.stderr)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "points.yaml").write_text(YAML)
    return tmp_path


def kvlab(folder: Path, tracking: str, *words: str) -> tuple[dict[str, Any], list[str]]:
    """Run a command; return its JSON, and the heavy modules that its process imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words, "--json"],
        cwd=folder,
        env={
            **os.environ,
            "KVLAB_HOME": str(folder / "home"),
            "MLFLOW_TRACKING_URI": tracking,
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


def test_a_run_without_mlflow_ends_as_ever_and_a_later_one_brings_mlflow_up_to_date(
    folder: Path, uri: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    outcome, heavy = kvlab(folder, nowhere, "run", "points.yaml")
    assert outcome["counts"] == {"done": 2, "failed": 2}
    assert "does not answer" in outcome["mirror"]
    assert heavy == []

    for _ in range(5):  # a run waits seconds for MLflow, and a busy machine takes more
        resumed, heavy = kvlab(folder, uri, "resume")
        assert heavy == []
        if resumed["mirror"] is None:
            break
    assert resumed["mirror"] is None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kvlab/points")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "logs[seed=0]": "FINISHED", "logs[seed=1]": "FINISHED", "bad[seed=0]": "FAILED",
        "bad[seed=1]": "FAILED", "points #1": "FAILED",
    }  # fmt: skip
    for seed in (0, 1):
        history = client.get_metric_history(runs[f"logs[seed={seed}]"].info.run_id, "value")
        assert len({point.step for point in history}) == len(history) == 1200
