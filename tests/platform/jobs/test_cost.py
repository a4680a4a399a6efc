"""What jobs are predicted to cost where layers run in passes: steps, low rank, teacher, scores."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.cost import generating, scoring, training
from kvlab.platform.jobs.kind import Parent

CONFIG = DecoderConfig(vocab_size=64, **llama(32, 6, 4, 2, 88))
UPWARD = resolve({"cross_layer": {"layout": "sandwich_top", "kv_layers": 3}}).to_dict()
ROWS = 16
SCORED = {
    "metrics": ["perplexity"],
    "sequence_length": ROWS,
    "tokens": 1,
    "batch_size": 1,
    "dtype": "float32",
    "apply": {},
}


def spec(**changes: Any) -> dict[str, Any]:
    own = {"method": {}, "sequence_length": ROWS, "tokens": 1, "precision": "float32"}
    return {**own, **changes}


def trained(teacher: tuple[DecoderConfig, dict[str, Any]] | None = None, **changes: Any) -> float:
    flops = training(CONFIG, spec(**changes), teacher).flops
    assert flops is not None
    return flops


def scored(method: dict[str, Any], apply: dict[str, Any] | None = None) -> float:
    said = {**SCORED, "apply": apply or {}}
    flops = scoring(CONFIG, method, said).flops
    assert flops is not None
    return flops


def test_one_pass_is_a_third_of_a_step() -> None:
    assert scored({}) == pytest.approx(trained() / 3)


def test_passes_without_gradient_are_counted_once() -> None:
    """Seven of nine passes have no backward pass, so a step is far from three times its scoring."""
    assert scored(UPWARD) < trained(method=UPWARD) < 2 * scored(UPWARD)
    assert trained(method=UPWARD) > 2 * trained()


def test_low_rank_halves_what_goes_back() -> None:
    for method in ({}, UPWARD):
        forward, whole = scored(method), trained(method=method)
        low_rank = trained(method=method, lora={"rank": 2})
        assert low_rank == pytest.approx(forward + (whole - forward) / 2)


def test_a_teacher_is_scored_in_all_its_passes() -> None:
    taught = trained((CONFIG, UPWARD), method={})
    assert taught == pytest.approx(trained() + scored(UPWARD))


def test_scoring_runs_as_often_as_asked() -> None:
    once = scored(UPWARD, resolve({"prefill": {"passes": 1}}).to_dict())
    assert once < scored({}) < scored(UPWARD)


def test_generation_leaves_out_what_an_early_exit_leaves_out() -> None:
    said = {"prompt": 64, "generate": 1, "batch": [1], "repeats": 1, "warmup": 0, "dtype": "auto"}
    bottom = resolve({"cross_layer": {"layout": "pizza_bottom", "kv_layers": 3}})
    whole = resolve({"prefill": {"early_exit": False}}).to_dict()
    early = generating(CONFIG, bottom.to_dict(), {**said, "apply": {}})
    full = generating(CONFIG, bottom.to_dict(), {**said, "apply": whole})
    assert early.flops is not None
    assert full.flops is not None
    cost = cost_of(CONFIG, bottom)
    assert early.flops == pytest.approx(cost.prefill_flops(64) + cost.decode_flops(64))
    assert 1 / 3 < early.flops / full.flops < 0.4  # two of six layers in full, keys of a third
    assert early.kv_bytes_per_token == full.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4


def test_each_metric_of_an_evaluation_is_counted_once() -> None:
    asked = {"tasks": ["passkey"], "lengths": [16], "depths": [0.0], "samples": 3}
    common = {
        "metrics": [],
        "sequence_length": ROWS,
        "tokens": 32 * ROWS,
        "batch_size": 4,
        "dtype": "float32",
        "apply": resolve({"h2o": {}}).to_dict(),
        "divergence": {"prompt": 8, "generate": 8},
        "recall": asked,
    }
    parts = {"perplexity": (), "divergence": ("divergence",), "recall": ("recall",)}
    model = Parent("base", "train", {"model": {"config": CONFIG.to_dict()}, "method": {}}, {})

    def predicted(*metrics: str, **changes: Any) -> float:
        absent = {"divergence", "recall"} - {key for name in metrics for key in parts[name]}
        said = {**common, "metrics": list(metrics), **changes}
        said = {key: value for key, value in said.items() if key not in absent}
        flops = KINDS["evaluate"].predict(said, {"of": model}).flops
        assert flops is not None
        return flops

    each = [predicted(name) for name in parts]
    assert predicted(*parts) == pytest.approx(sum(each))
    # The full cache reads on once; another beside it, and both generate: four sessions.
    cost = cost_of(CONFIG, resolve({}))
    once = cost.prefill_flops(8) + 8 * cost.decode_flops(8 + 4, 8)
    assert predicted("divergence", apply={}) == pytest.approx(32 * once)
    covering = resolve({"sliding_window": {"window": 64}}).to_dict()
    assert predicted("divergence", apply=covering) == pytest.approx(4 * 32 * once)
    # The full cache is asked once, not compared with itself.
    assert predicted("recall", apply={}) == pytest.approx(each[2] / 2)
