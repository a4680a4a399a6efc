"""ADORE on a model of Mistral 7B's shape, with an untrained controller (2407.02328)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.papers.side import Pair, Side, Workload
from kvlab.platform.bench.papers.squeeze import mistral

KEPT = {"cuda": 192, "cpu": 16}
"""m, the value that readers of the paper report."""
REBUILT = (8, 0)
PAPER = "up to 3.2x (221.8 % more) on a 7B Llama; batch, lengths and GPU are not known"
WORKLOADS = {"cuda": (Workload(512, 1024), Workload(5, 2043)), "cpu": (Workload(24, 48),)}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Compare with full attention on the same weights."""
    kind = torch.device(device).type
    config = mistral(kind)
    pair = Pair(Side("full attention, SDPA", config, kernels=False), device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        scores = scorer(config, Path(folder))
        who = "a controller" if "controller" in scores else "attention (no safetensors here)"
        for rebuilt in REBUILT:
            for work in WORKLOADS[kind]:
                applied = {
                    "adore": {**scores, "rebuild": rebuilt},
                    "uniform": {"tokens": KEPT[kind]},
                }
                name = f"ADORE, {KEPT[kind]} rows, R = {rebuilt}, scored by {who}"
                yield pair.line(Side(name, config, applied=applied), work, PAPER)


def scorer(config: DecoderConfig, folder: Path) -> dict[str, Any]:
    """An untrained controller in a folder; the rule that needs none where none can be written."""
    torch.manual_seed(0)
    try:
        Controller(ControllerConfig(config.vocab_size, config.width)).save(folder)
    except ImportError:
        return {"scores": "rule"}
    return {"controller": str(folder)}
