"""What jobs will cost, from `kvlab.methods.cost` and the sizes in their specs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from kvlab.methods.cost import Cost
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.jobs.flops import Canonical, cost_under, train_flops_per_token
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
    itemsize = ITEMSIZES.get(spec["precision"], ITEMSIZE)
    cost = cost_under(config, spec["method"])
    predicted = _trained(cost, spec["sequence_length"], spec["tokens"], itemsize)
    if not spec.get("lora") and teacher is None:
        return predicted
    return replace(predicted, flops=train_flops_per_token(config, spec, teacher) * spec["tokens"])


def scoring(config: DecoderConfig, method: Canonical, spec: Mapping[str, Any]) -> Prediction:
    """Predict an evaluate job: one forward pass, a third of a training step."""
    cost = cost_under(config, method, spec["apply"])
    itemsize = ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    return _trained(cost, spec["sequence_length"], spec["tokens"] / 3, itemsize)


@lru_cache(maxsize=4096)
def _trained(cost: Cost, length: int, tokens: float, itemsize: int) -> Prediction:
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=cost.train_flops_per_token(length) * tokens,
        kv_bytes_per_token=cost.kv_bytes_per_token(length, itemsize),
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
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=once * runs,
        kv_bytes_per_token=cost.kv_bytes_per_token(prompt + generate, itemsize),
    )
