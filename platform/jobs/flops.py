"""FLOPs of training, for what is predicted and for what a job reports. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict

Canonical = Mapping[str, Any]
"""`Method.to_dict()`."""
LORA = 1 / 2
"""What is left of a backward pass under LoRA: frozen weights get no gradient."""


@lru_cache(maxsize=4096)
def _cost(config: DecoderConfig, method: str) -> Cost:
    return cost_of(config, from_dict(json.loads(method)))


def cost_under(config: DecoderConfig, *methods: Canonical) -> Cost:
    """Return the cost of a decoder under the choices of all methods, later ones first."""
    choices: dict[str, Any] = {}
    for method in methods:
        choices |= method
    return _cost(config, json.dumps(choices))


@lru_cache(maxsize=4096)
def forward_flops_per_token(cost: Cost, length: int) -> float:
    """Return the FLOPs of scoring rows of so many tokens, per token."""
    return cost.score_flops_per_token(length)


@lru_cache(maxsize=4096)
def _step_flops_per_token(cost: Cost, length: int) -> float:
    return cost.train_flops_per_token(length)


def train_flops_per_token(
    config: DecoderConfig,
    spec: Mapping[str, Any],
    teacher: tuple[DecoderConfig, Canonical] | None = None,
) -> float:
    """Return the FLOPs of a train or uptrain job per token of its rows.

    Under LoRA what the low-rank products themselves cost is left out; a teacher (its sizes and
    method) adds one forward pass.
    """
    length, cost = spec["sequence_length"], cost_under(config, spec["method"])
    flops = _step_flops_per_token(cost, length)
    if spec.get("lora"):
        forward = forward_flops_per_token(cost, length)
        flops = forward + LORA * (flops - forward)
    if teacher is not None:
        flops += forward_flops_per_token(cost_under(*teacher), length)
    return flops
