"""What jobs will cost, from `kvlab.methods.cost` and the sizes in their specs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kvlab.methods.cost import Cost
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.jobs.flops import (
    Canonical,
    cost_under,
    forward_flops_per_token,
    train_flops_per_token,
)
from kvlab.platform.jobs.kind import Prediction

ITEMSIZE = 4
"""Bytes of a cached value where `dtype` is left to the device: a CPU keeps float32."""
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def first_target(config: DecoderConfig, method: Canonical) -> int:
    """Return the first position of a window that a model predicts."""
    return cost_under(config, method).first_target()


def training(
    config: DecoderConfig,
    spec: Mapping[str, Any],
    teacher: tuple[DecoderConfig, Canonical] | None = None,
) -> Prediction:
    """Predict a train or uptrain job."""
    length = spec["sequence_length"]
    itemsize = ITEMSIZES.get(spec["precision"], ITEMSIZE)
    flops = train_flops_per_token(config, spec, teacher) * spec["tokens"]
    return _predicted(cost_under(config, spec["method"]), length, flops, itemsize)


def scoring(config: DecoderConfig, method: Canonical, spec: Mapping[str, Any]) -> Prediction:
    """Predict an evaluate job, which scores in one go."""
    cost, length = cost_under(config, method, spec["apply"]), spec["sequence_length"]
    itemsize = ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    flops = forward_flops_per_token(cost, length) * spec["tokens"]
    return _predicted(cost, length, flops, itemsize)


@lru_cache(maxsize=4096)
def _predicted(cost: Cost, tokens: int, flops: float, itemsize: int) -> Prediction:
    """Predict a job of so many FLOPs whose sequences have so many tokens."""
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=flops,
        kv_bytes_per_token=cost.kv_bytes_per_token(tokens, itemsize),
    )


def generating(config: DecoderConfig, method: Canonical, spec: Mapping[str, Any]) -> Prediction:
    """Predict a benchmark job over all its batch sizes and repeats."""
    runs = sum(spec["batch"]) * (spec["repeats"] + spec["warmup"])
    itemsize = ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    cost = cost_under(config, method, spec["apply"])
    return _generated(cost, spec["prompt"], spec["generate"], runs, itemsize)


@lru_cache(maxsize=4096)
def _generated(cost: Cost, prompt: int, generate: int, runs: int, itemsize: int) -> Prediction:
    once = cost.prefill_flops(prompt) + generate * cost.decode_flops(prompt + generate // 2)
    return _predicted(cost, prompt + generate, once * runs, itemsize)
