"""The benches themselves, at sizes that only show that they measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvlab.db.store import Store
from kvlab.methods.decoder.config import PRESETS
from kvlab.platform.bench import __main__ as command
from kvlab.platform.bench import decode, dispatch, jobs, kv_bytes, metrics, sharing, training
from kvlab.platform.bench.line import Line
from kvlab.platform.controller.jobs import new_job
from kvlab.platform.controller.local import local_ray
from kvlab.platform.home import Home
from kvlab.platform.spec.read import load_graph


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "QUEUES", (10, 100))
    monkeypatch.setattr(dispatch, "EVENTS", 50)
    monkeypatch.setattr(metrics, "CALLS", 500)
    monkeypatch.setattr(metrics, "MLFLOW_CALLS", 5)
    monkeypatch.setattr(metrics, "REPEATS", 1)
    monkeypatch.setattr(training, "SHAPES", {"cpu": ("nano", 2, 16)})
    monkeypatch.setattr(training, "WARMUP", 1)
    monkeypatch.setattr(training, "REPEATS", 2)
    monkeypatch.setattr(jobs, "JOBS", 6)
    monkeypatch.setattr(jobs, "REPEATS", 1)
    monkeypatch.setattr(decode, "SHAPES", ((8, 9),))
    monkeypatch.setattr(decode, "SETTINGS", {"cpu": ("micro", 2**20)})
    monkeypatch.setattr(decode, "REPEATS", 1)
    monkeypatch.setattr(sharing, "SIZES", {**sharing.SIZES, **PRESETS["nano"], "layers": 12})
    monkeypatch.setattr(sharing, "GENERATE", 2)
    monkeypatch.setattr(sharing, "LONG_PROMPT", 32)
    monkeypatch.setattr(sharing, "REPEATS", 2)
    monkeypatch.setattr(kv_bytes, "METHODS", kv_bytes.METHODS[1::2])
    monkeypatch.setattr(kv_bytes, "EVICTIONS", kv_bytes.EVICTIONS[1:4:2])
    monkeypatch.setattr(kv_bytes, "BUDGETS", kv_bytes.BUDGETS[:2])
    monkeypatch.setattr(kv_bytes, "PRECISIONS", kv_bytes.PRECISIONS[:2])
    monkeypatch.setattr(kv_bytes, "CUT", 3)
    monkeypatch.setattr(kv_bytes, "BATCH", 2)
    monkeypatch.setattr(kv_bytes, "PROMPT", 140)
    monkeypatch.setattr(kv_bytes, "GENERATE", 8)


def sound(lines: list[Line]) -> bool:
    return bool(lines) and all(line.ours > 0 and not line.void for line in lines)


def test_dispatch() -> None:
    assert sound(dispatch.run())


def test_metrics_are_all_found_again() -> None:
    assert sound(metrics.run())


def test_training_is_void_when_the_losses_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sound(training.run())
    monkeypatch.setattr(training, "CLOSE", -1.0)
    (line,) = training.run()
    assert "apart" in line.void
    assert line.ratio is None


def test_kv_bytes_of_every_cache_are_within_the_tolerance() -> None:
    lines = kv_bytes.run()
    assert [line.name for line in lines if not line.met] == []


def test_decode_compares_equal_bodies_within_one_budget() -> None:
    lines = decode.run()
    assert sound(lines)
    for line in lines:
        assert line.detail is not None
        blocks, tokens = line.detail["blocks"], line.detail["tokens"]
        assert blocks["batch"] > tokens["batch"]
        assert max(blocks["kv_bytes"], tokens["kv_bytes"]) <= 2**20


@pytest.mark.ray
def test_shared_layers_are_compared_at_equal_work() -> None:
    *decoded, early = sharing.run()
    assert sound([*decoded, early])
    assert len(decoded) == len(sharing.BOTTOM) * len(sharing.BATCHES)
    assert early.detail is not None
    exits, whole = early.detail["predicted_flops"]
    assert whole / exits == pytest.approx(2, abs=0.4)  # half the layers see one row


def test_jobs_are_all_told_of_in_the_store(tmp_path: Path) -> None:
    home = Home.find(tmp_path)
    with local_ray(1):
        rates, missing = jobs.job_rates(home)
    assert len(rates) == 1
    assert min(rates[0]) > 0
    assert missing == 0
    with Store.open(home.url) as store:
        graph = load_graph(jobs.WORKFLOW.format(seeds="7, 8"))
        stored = [new_job(cell) for cell in graph.cells]
        never_run = store.create_workflow("idle", "", {}, stored, 0.0)
        assert jobs.ended(store, never_run) == []


def test_a_bench_runs_apart_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    command.main(["--only", "dispatch", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["failed"] == []
    assert {line["unit"] for line in written["lines"]} == {"ms", "µs"}
    assert "10,000 jobs queued" in capsys.readouterr().out


def test_an_unknown_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--only", "dispach"])
    assert end.value.code == 2
    assert "known: startup, dispatch" in capsys.readouterr().err


def test_without_a_gpu_the_gpu_bench_says_so_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "has_gpu", lambda: False)
    assert command.main(["--gpu"]) == 0
    assert "needs a CUDA device" in capsys.readouterr().out
