"""The benches of cut caches, at sizes that only show that they measure what they say."""

from __future__ import annotations

import pytest
import torch

from kvlab.methods.registry import resolve
from kvlab.platform.bench import adore, eviction, kv_bytes, squeeze


def test_every_policy_decodes_beside_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "PRESET", "nano")
    monkeypatch.setattr(eviction, "PROMPT", 192)
    monkeypatch.setattr(eviction, "BATCHES", (2,))
    monkeypatch.setattr(eviction, "STEPS", 2)
    monkeypatch.setattr(eviction, "REPEATS", 2)
    lines = eviction.run()
    assert len(lines) == len(eviction.POLICIES)
    for line, (name, _) in zip(lines, eviction.POLICIES, strict=True):
        assert line.name.endswith(name)
        assert line.ratio is not None
        assert line.ratio > 0
        assert line.detail is not None
        assert line.detail["kv_bytes"] < line.detail["their_kv_bytes"]


def test_every_policy_keeps_the_share_of_the_bench() -> None:
    for _, written in eviction.POLICIES:
        method = resolve(eviction.kept(written))
        assert method["budget"].params.share == eviction.SHARE


def test_calibration_has_a_target_from_a_width_and_prompt_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(squeeze, "SIZES", ((64, 4, 64), (128, 4, 64)))
    monkeypatch.setattr(squeeze, "LARGE", 64)
    monkeypatch.setattr(squeeze, "REPEATS", 3)
    lines = squeeze.run()
    assert [line.limit for line in lines] == [2.0, 2.0]
    assert all(line.detail and len(line.detail["percent"]["samples"]) == 3 for line in lines)
    monkeypatch.setattr(squeeze, "LARGE", 100)
    assert [line.limit for line in squeeze.run()] == [None, None]


def test_calibration_is_what_it_adds_in_per_cent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squeeze, "SIZES", ((64, 4, 32),))
    monkeypatch.setattr(squeeze, "LARGE", 32)
    monkeypatch.setattr(squeeze, "interleaved", lambda *_, **__: ([1.03] * 3, [1.0] * 3))
    (line,) = squeeze.run()
    assert line.ours == pytest.approx(3.0)
    assert line.met is False


def test_bytes_are_compared_for_every_combination_that_goes() -> None:
    streaming = dict(kv_bytes.EVICTIONS)["StreamingLLM"]
    labels = [label for label, _ in kv_bytes.combinations(streaming)]
    assert "uniform" in labels
    assert "squeeze_attention + int8" in labels
    assert not any("global_topk" in label for label in labels)  # it has no scores to compare
    assert len(labels) == 4 * len(kv_bytes.PRECISIONS)
    full = [label for label, _ in kv_bytes.combinations({"full_attention": {}})]
    assert full == ["as it is", "int8", "fp8", "kivi 4 bit", "kivi 2 bit"]


def test_the_line_of_bytes_is_that_of_the_worst() -> None:
    line = kv_bytes.line_of("x", {"a": (100, 100), "b": (103, 100)}, torch.float32)
    assert line.ours == pytest.approx(3.0)
    assert line.met is False


def test_adore_takes_turns_with_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"PRESET": "nano", "PROMPT": 256, "BATCHES": (2,), "STEPS": 2, "REPEATS": 2}
    for name, value in small.items():
        monkeypatch.setattr(eviction, name, value)
    lines = adore.run()
    assert len(lines) == len(adore.REBUILT) + 2
    by_rebuilt = {line.name.rsplit(": ", 1)[1]: line.detail or {} for line in lines}
    predicted = [by_rebuilt[f"R = {r}"]["predicted_ratio_of_flops"] for r in adore.REBUILT]
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[0] / predicted[-1] > 10  # 17 rows instead of one
    offloaded = by_rebuilt["R = 8, offloaded"]
    assert offloaded["kv_bytes"] > offloaded["their_kv_bytes"] > by_rebuilt["R = 8"]["kv_bytes"]
