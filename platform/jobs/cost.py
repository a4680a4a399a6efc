"""What jobs will cost, from `kvlab.methods.cost` and the sizes in their specs. No torch."""

from __future__ import annotations

import math
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

OF_WINDOWS = frozenset({"perplexity", "loss_by_position"})
OF_QUESTIONS = frozenset({"recall", "multi_turn"})
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
    """Predict an evaluate job: each of its metrics that has work of its own.

    Of divergence, generation until the last token; of recall, the prompts and no answers.
    """
    full, cost = cost_under(config, method), cost_under(config, method, spec["apply"])
    length, itemsize = spec["sequence_length"], ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    batches = math.ceil(spec["tokens"] / length / spec["batch_size"])
    flops, steps = 0.0, 0
    if OF_WINDOWS.intersection(spec["metrics"]):
        flops += forward_flops_per_token(cost, length) * spec["tokens"]
        each = _score_steps(cost, length)
        steps += 0 if each == 1 else each * batches
    if asked := spec.get("divergence"):
        prompt, generate = asked["prompt"], asked["generate"]
        given = length - prompt
        if spec["apply"]:
            once = sum(_continued(each, prompt, (given, generate)) for each in (full, cost))
            steps += 2 * (given + generate) * batches
        else:
            once = _continued(full, prompt, (given,))
            steps += given * batches
        flops += once * spec["tokens"] / length
    if asked := spec.get("recall"):
        ways = len(OF_QUESTIONS.intersection(spec["metrics"]))
        cells = len(asked["tasks"]) * len(asked["depths"]) * asked["samples"] * ways
        both = (full, cost) if spec["apply"] else (full,)
        flops += cells * sum(each.prefill_flops(rows) for rows in asked["lengths"] for each in both)
    return _predicted(cost, length, flops, itemsize, steps=steps)


@lru_cache(maxsize=4096)
def _score_steps(cost: Cost, length: int) -> int:
    return cost.score_steps(length)


@lru_cache(maxsize=4096)
def _continued(cost: Cost, prompt: int, added: tuple[int, ...]) -> float:
    """FLOPs of sessions over one prompt, one for each number of tokens that follow."""
    return sum(
        cost.prefill_flops(prompt) + rows * cost.decode_flops(prompt + rows // 2, prompt)
        for rows in added
    )


@lru_cache(maxsize=4096)
def _predicted(
    cost: Cost,
    tokens: int,
    flops: float,
    itemsize: int,
    prompt: int | None = None,
    steps: int = 0,
) -> Prediction:
    """Predict a job of so many FLOPs whose sequences have so many tokens."""
    return Prediction(
        parameters=cost.total_parameters(),
        body_parameters=cost.body_parameters(),
        flops=flops,
        kv_bytes_per_token=cost.kv_bytes_per_token(tokens, itemsize, prompt),
        steps=steps,
    )


def generating(config: DecoderConfig, method: Canonical, spec: Mapping[str, Any]) -> Prediction:
    """Predict a benchmark job over all its batch sizes and repeats."""
    runs = sum(spec["batch"]) * (spec["repeats"] + spec["warmup"])
    itemsize = ITEMSIZES.get(spec["dtype"], ITEMSIZE)
    cost = cost_under(config, method, spec["apply"])
    return _generated(cost, spec["prompt"], spec["generate"], runs, itemsize)


@lru_cache(maxsize=4096)
def _generated(cost: Cost, prompt: int, generate: int, runs: int, itemsize: int) -> Prediction:
    step = cost.decode_flops(prompt + generate // 2, prompt)
    once = cost.prefill_flops(prompt) + generate * step
    return _predicted(cost, prompt + generate, once * runs, itemsize, prompt)
