"""FLOPs of training, for what is predicted and for what a job reports. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from kvlab.methods.axis import from_dict
from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import DecoderConfig

Canonical = Mapping[str, Any]
"""`Method.to_dict()`."""
LORA = 2 / 3
"""FLOPs of a step under LoRA: forward, and back through frozen weights that get no gradient."""


@lru_cache(maxsize=4096)
def _cost(config: DecoderConfig, method: str) -> Cost:
    return cost_of(config, from_dict(json.loads(method)))


def cost_under(config: DecoderConfig, *methods: Canonical) -> Cost:
    """Return the cost of a decoder under the choices of all methods, later ones first."""
    choices: dict[str, Any] = {}
    for method in methods:
        choices |= method
    return _cost(config, json.dumps(choices))


def train_flops_per_token(
    config: DecoderConfig,
    spec: Mapping[str, Any],
    teacher: tuple[DecoderConfig, Canonical] | None = None,
) -> float:
    """Return the FLOPs of a train or uptrain job per token of its rows.

    Under LoRA what the low-rank products themselves cost is left out; a teacher (its sizes and
    method) adds one forward pass.
    """
    length = spec["sequence_length"]
    own = cost_under(config, spec["method"]).train_flops_per_token(length)
    flops = own * LORA if spec.get("lora") else own
    if teacher is not None:
        flops += cost_under(*teacher).train_flops_per_token(length) / 3
    return flops
