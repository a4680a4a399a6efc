"""The benchmark job through vLLM's real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve
from kvlab.platform.jobs.local import run_cell

pytest.importorskip("vllm", reason="vLLM is not installed")

SPEC: dict[str, Any] = {
    "engine": "vllm", "prompt": 48, "generate": 8, "batch": [2, 4], "repeats": 2, "warmup": 0,
    "apply": {}, "kv_budget": 1 << 20, "dtype": "auto", "seed": 0,
}  # fmt: skip


@pytest.fixture
def base32(tmp_path: Path) -> Path:
    """A model whose heads vLLM's CPU kernels take."""
    folder = tmp_path / "base"
    folder.mkdir()
    build(DecoderConfig(257, **llama(64, 2, 2, 1, 96)), resolve({})).save(folder)
    return folder


def test_more_requests_fit_where_rows_are_released(base32: Path, tmp_path: Path) -> None:
    """At equal bytes; and what each took is what was predicted."""
    found = {}
    for name, apply in {"full": {}, "h2o": {"h2o": {}, "uniform": {"tokens": 8}}}.items():
        spec = {**SPEC, "apply": resolve(apply).to_dict()}
        found[name] = run_cell("benchmark", spec, {"of": base32}, tmp_path / name)
    for result in found.values():
        assert result["gates"]["tokens_as_asked"]
        assert [row["batch"] for row in result["rows"]] == [2, 4]
        assert result["engine"]["model"] == "KvlabForCausalLM"
        assert result["engine"]["pool_bytes"] <= 1 << 20
        assert "largest_batch" not in result
        row = result["rows"][-1]
        assert row["tokens_per_second"]["median"] > 0
        assert row["time_to_first_token"]["median"] > 0
        assert row["kv_bytes_per_token"] >= 0.9 * row["kv_bytes_per_token_predicted"]
        assert row["kv_bytes"] == pytest.approx(4 * 56 * row["kv_bytes_per_token"])
    full, less = (found[name]["rows"][0] for name in ("full", "h2o"))
    assert less["pool_requests"] > 3 * full["pool_requests"]
    assert less["vllm_requests"] > 3 * full["vllm_requests"]
