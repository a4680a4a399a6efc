"""AdamW and its learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def adamw(module: nn.Module, spec: Mapping[str, Any]) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; only matrices decay.

    Args:
        module: what is trained, already on its device and sharded.
        spec: learning_rate, betas, weight_decay.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": spec["weight_decay"]},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec["learning_rate"],
        betas=tuple(spec["betas"]),
        fused=True,
    )


def learning_rate(step: int, steps: int, spec: Mapping[str, Any]) -> float:
    """Return the rate of step 0..steps-1: linear warm-up to the peak, then a cosine.

    Args:
        spec: learning_rate (peak), warmup (share of steps), final_learning_rate (share of peak).
    """
    peak, last = float(spec["learning_rate"]), float(spec["final_learning_rate"])
    warm = round(float(spec["warmup"]) * steps)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - 1 - warm)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
