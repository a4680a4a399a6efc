"""What jobs will cost, from `kvlab.methods.cost` and the sizes in their specs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kvlab.methods.axis import Method, from_dict
from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.jobs.kind import Prediction

ITEMSIZE = 4
"""Bytes of a cached value where `dtype` is left to the device: a CPU keeps float32."""
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@lru_cache(maxsize=4096)
def _cost(config: str, method: str) -> Cost:
    return cost_of(DecoderConfig.from_dict(json.loads(config)), from_dict(json.loads(method)))


def _of(config: DecoderConfig, *methods: Method) -> Cost:
    choices: dict[str, Any] = {}
    for method in methods:
        choices |= method.to_dict()
    return _cost(json.dumps(config.to_dict()), json.dumps(choices))


def first_target(config: DecoderConfig, method: Method) -> int:
    """Return the first position of a window that a model predicts."""
    return _of(config, method).first_target()


def training(config: DecoderConfig, method: Method, spec: Mapping[str, Any]) -> Prediction:
    """Predict a train or uptrain job."""
    cost, length = _of(config, method), spec["sequence_length"]
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=cost.train_flops_per_token(length) * spec["tokens"],
        kv_bytes_per_token=cost.kv_bytes_per_token(length, ITEMSIZE),
    )


def scoring(config: DecoderConfig, method: Method, spec: Mapping[str, Any]) -> Prediction:
    """Predict an evaluate job: one forward pass, a third of a training step."""
    cost, length = _of(config, method, from_dict(spec["apply"])), spec["sequence_length"]
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=cost.train_flops_per_token(length) / 3 * spec["tokens"],
        kv_bytes_per_token=cost.kv_bytes_per_token(length, ITEMSIZE),
    )


def generating(
    config: DecoderConfig, method: Method, apply: Method, spec: Mapping[str, Any]
) -> Prediction:
    """Predict a benchmark job over all its batch sizes and repeats."""
    cost = _of(config, method, apply)
    prompt, generate = spec["prompt"], spec["generate"]
    runs = sum(spec["batch"]) * (spec["repeats"] + spec["warmup"])
    once = cost.prefill_flops(prompt) + generate * cost.decode_flops(prompt + generate // 2)
    itemsize = ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=once * runs,
        kv_bytes_per_token=cost.kv_bytes_per_token(prompt + generate, itemsize),
    )
