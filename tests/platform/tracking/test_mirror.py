"""The mirror on a real MLflow database: what it holds, and that nothing is ever doubled."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from kvlab.platform.tracking.mirror import Mirror, MirrorRefused, MirrorUnreachable

BLOCK = {"granularity": {"block_transformer": {"block_length": 2}}}
CONFIG = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "vocab_size": 2048}


def workflow(state: str = "running", **changes: Any) -> dict[str, Any]:
    return {"id": 7, "name": "study", "state": state, "created_at": 100.5, **changes}


def train(state: str = "running", **changes: Any) -> dict[str, Any]:
    return {
        "id": 1, "name": "base[seed=0]", "job": "base", "kind": "train", "identity": "ab12",
        "state": state, "axes": {"seed": 0}, "started_at": 101.0,
        "spec": {"method": {}, "model": {"config": CONFIG}, "tokens": 400_000, "seed": 0},
        **changes,
    }  # fmt: skip


def evaluate(**changes: Any) -> dict[str, Any]:
    return {
        "id": 2, "name": "quality[of=base]", "job": "quality", "kind": "evaluate",
        "identity": "cd34", "state": "done", "axes": {"seed": 0, "block_length": 2},
        "started_at": 110.0, "ended_at": 120.25, "model": {"method": BLOCK},
        "spec": {"apply": {}, "sequence_length": 256, "seed": 0},
        "result": {
            "perplexity": 30.5, "perplexity_per_byte": 2.7, "bits_per_byte": 1.4, "loss": 3.42,
            "window_losses": [1.0] * 50, "loss_by_position": [None, 4.0, 3.5],
        },
        **changes,
    }  # fmt: skip


def points(count: int, job_id: int = 1) -> list[dict[str, Any]]:
    return [
        {"job_id": job_id, "key": "loss", "step": s, "value": 9.0 - s, "time_ms": 101_000 + s}
        for s in range(count)
    ]


def whole(count: int = 3) -> list[dict[str, Any]]:
    """A workflow from its first to its last message."""
    done = train("done", ended_at=109.0, result={"loss": 3.1, "flops": 1e9, "seconds": 8.0})
    return [
        {"workflow": workflow(), "jobs": [train()], "points": points(count)},
        {"workflow": workflow(), "jobs": [done, evaluate()]},
        {"workflow": workflow("done", ended_at=121.0), "report": "<p>compared</p>"},
    ]


def held(uri: str) -> dict[str, Any]:
    """Everything MLflow holds of the experiment: runs by name, and every metric's history."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kvlab/study")
    runs = client.search_runs([experiment.experiment_id])
    return {
        run.info.run_name: (
            run.info.status,
            run.data.params,
            {
                key: [(m.step, m.value, m.timestamp) for m in history(client, run, key)]
                for key in run.data.metrics
            },
        )
        for run in runs
    } | {"count": len(runs)}


def history(client: MlflowClient, run: Any, key: str) -> list[Any]:
    return list(client.get_metric_history(run.info.run_id, key))


def test_a_workflow_is_a_run_with_its_jobs_nested_under_it(uri: str, tmp_path: Path) -> None:
    marks = Mirror(uri).send(whole())
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(marks["workflows"][7])
    child = client.get_run(marks["jobs"][2]["run_id"])

    experiment = client.get_experiment_by_name("kvlab/study")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert parent.info.run_name == "study #7"
    assert parent.info.status == "FINISHED"
    assert (parent.info.start_time, parent.info.end_time) == (100_500, 121_000)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["kvlab.identity"] == "cd34"
    assert child.data.tags["kvlab.workflow_id"] == "7"
    assert child.data.tags["kvlab.job_id"] == "2"
    assert child.data.params == {
        "kind": "evaluate", "method": "block_transformer", "apply": "none",
        "seed": "0", "block_length": "2", "sequence_length": "256",
    }  # fmt: skip
    assert child.data.metrics == {
        "perplexity": 30.5, "perplexity_per_byte": 2.7, "bits_per_byte": 1.4, "final_loss": 3.42,
        "loss_by_position": 3.5,
    }  # fmt: skip
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    assert (tmp_path / "mlflow-artifacts" / parent.info.run_id).is_dir()


def test_marks_say_what_arrived(uri: str) -> None:
    mirror = Mirror(uri)
    first = mirror.send(whole()[:1])
    assert first["jobs"][1] | {"run_id": ""} == {"run_id": "", "state": "running", "step": 2}
    assert mirror.send(whole()[1:])["jobs"][1]["state"] == "done"


def test_sending_everything_again_changes_nothing(uri: str) -> None:
    mirror = Mirror(uri)
    mirror.send(whole(1500))
    before = held(uri)
    assert len(before["base[seed=0]"][2]["loss"]) == 1500
    mirror.send(whole(1500))
    assert held(uri) == before


def test_another_mirror_finds_the_runs_again(uri: str) -> None:
    marks = Mirror(uri).send(whole()[:1])
    again = Mirror(uri).send(whole(5))
    assert again["workflows"] == marks["workflows"]
    assert again["jobs"][1]["run_id"] == marks["jobs"][1]["run_id"]
    found = held(uri)
    assert found["count"] == 3
    assert [step for step, _, _ in found["base[seed=0]"][2]["loss"]] == [0, 1, 2, 3, 4]
    assert found["base[seed=0]"][0] == "FINISHED"


def test_two_stores_whose_workflows_have_one_number_do_not_share_a_run(uri: str) -> None:
    Mirror(uri).send([{"workflow": workflow()}])
    Mirror(uri).send([{"workflow": workflow(created_at=200.0)}])
    assert held(uri)["count"] == 2


def test_a_newer_wording_of_a_parameter_does_not_block_the_mirror(uri: str) -> None:
    Mirror(uri).send([{"workflow": workflow(), "jobs": [train()]}])
    changed = train("done", ended_at=109.0, spec={"method": BLOCK, "tokens": 5})
    Mirror(uri).send([{"workflow": workflow(), "jobs": [changed]}])
    status, params, _ = held(uri)["base[seed=0]"]
    assert status == "FINISHED"
    assert params["method"] == "full attention"


def test_jobs_that_never_began_have_no_run(uri: str) -> None:
    states = ("waiting", "queued", "skipped", "cancelled")
    jobs = [
        train(state, id=number, name=state, started_at=None) for number, state in enumerate(states)
    ]
    Mirror(uri).send([{"workflow": workflow("cancelled"), "jobs": jobs}])
    assert held(uri)["count"] == 1


@pytest.mark.parametrize(
    ("state", "status"), [("queued", "SCHEDULED"), ("failed", "FAILED"), ("cancelled", "KILLED")]
)
def test_a_run_follows_its_job(uri: str, state: str, status: str) -> None:
    mirror = Mirror(uri)
    mirror.send([{"workflow": workflow(), "jobs": [train()]}])
    later = train(state, cause="out_of_memory", message="no room", ended_at=105.0)
    mirror.send([{"workflow": workflow(), "jobs": [later]}])
    assert held(uri)["base[seed=0]"][0] == status


def test_a_resumed_workflow_runs_again(uri: str) -> None:
    mirror = Mirror(uri)
    mirror.send([{"workflow": workflow("stopped", ended_at=103.0)}])
    mirror.send([{"workflow": workflow()}])
    assert held(uri)["study #7"][0] == "RUNNING"


def test_a_reused_job_says_whose_result_it_has(uri: str) -> None:
    reused = evaluate(reused_from=99, started_at=None)
    marks = Mirror(uri).send([{"workflow": workflow(), "jobs": [reused]}])
    run = MlflowClient(tracking_uri=uri).get_run(marks["jobs"][2]["run_id"])
    assert run.data.tags["reused_from"] == "99"
    assert run.data.metrics["perplexity"] == 30.5


def test_a_benchmark_shows_its_rates_by_batch_and_its_closed_gates(uri: str) -> None:
    rows = [
        {"batch": batch, "tokens_per_second": {"median": 100.0 * batch}, "kv_bytes_per_token": 64}
        for batch in (1, 8, 50)
    ]
    result = {"rows": rows, "largest_batch": 50, "gates": {"alone": False}}
    job = evaluate(kind="benchmark", spec={"batch": [1, 8], "apply": {}}, result=result)
    marks = Mirror(uri).send([{"workflow": workflow(), "jobs": [job]}])
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(marks["jobs"][2]["run_id"])
    assert run.data.metrics["tokens_per_second"] == 800.0
    assert run.data.metrics["kv_bytes_per_token"] == 64
    curve = [(m.step, m.value) for m in history(client, run, "tokens_per_second_by_batch")]
    assert sorted(curve) == [(1, 100.0), (8, 800.0), (50, 5000.0)]
    assert run.data.metrics["tokens_per_second_at_budget"] == 5000.0
    assert run.data.tags["kvlab.void"] == "alone"


def test_the_mean_speed_of_a_training_does_not_mix_with_its_curve(uri: str) -> None:
    result = {"flops": 1.0, "loss": 3.0, "tokens_per_second": 50.0}
    job = train("done", ended_at=109.0, result=result)
    point = {"job_id": 1, "key": "tokens_per_second", "step": 10, "value": 60.0, "time_ms": 5}
    Mirror(uri).send([{"workflow": workflow(), "jobs": [job], "points": [point]}])
    found = held(uri)["base[seed=0]"][2]
    assert [value for _, value, _ in found["tokens_per_second"]] == [60.0]
    assert [value for _, value, _ in found["mean_tokens_per_second"]] == [50.0]


def test_names_that_mlflow_refuses_are_changed(uri: str) -> None:
    odd = train(axes={"seed": 0, "../x": 1, "a\0b": "v" * 900}, name="base[../\0]")
    odd_points = [
        {"job_id": 1, "key": "/loss//é%", "step": 0, "value": float("nan"), "time_ms": 1},
        {"job_id": 1, "key": "..", "step": 0, "value": float("inf"), "time_ms": 1},
    ]
    marks = Mirror(uri).send([{"workflow": workflow(), "jobs": [odd], "points": odd_points}])
    run = MlflowClient(tracking_uri=uri).get_run(marks["jobs"][1]["run_id"])
    assert len(run.data.metrics) == 2
    assert len(run.data.params["a_b"]) == 500


def test_points_before_their_job_are_refused(uri: str) -> None:
    with pytest.raises(MirrorRefused, match="send its row first"):
        Mirror(uri).send([{"workflow": workflow(), "points": points(1)}])


def test_a_closed_port_is_told_quickly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(MirrorUnreachable, match=f"127.0.0.1:{port} does not answer"):
        Mirror(f"http://127.0.0.1:{port}").send(whole())
    assert time.monotonic() - began < 15


@pytest.fixture
def silent() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        held_open: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held_open.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in held_open:
            connection.close()


def test_a_silent_server_does_not_hang_the_sender(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()
    with pytest.raises(MirrorUnreachable):
        Mirror(f"http://127.0.0.1:{silent}").send(whole())
    assert time.monotonic() - began < 15


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(MirrorUnreachable) as caught:
        Mirror("http://user:hunter2@127.0.0.1:9").send(whole())
    assert "hunter2" not in str(caught.value)


def test_importing_and_making_a_mirror_does_not_import_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from kvlab.platform.tracking.mirror import Mirror; "
        f"Mirror('sqlite:///{tmp_path}/mlflow.db'); "
        "print([m for m in ('mlflow', 'torch', 'pandas', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_written_where_the_process_stands(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Mirror(uri).send(whole())
    assert list(elsewhere.iterdir()) == []
