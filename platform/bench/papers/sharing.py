"""Layers that share keys and values, at 1.1B parameters and half the KV layers (2410.14442)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.papers.side import Pair, Side, Workload

LAYOUTS = ("pizza_bottom", "lasagna_bottom", "sandwich_middle", "sandwich_top")
PAPER = "in figures alone"
WORKLOADS = {"cuda": (Workload(5, 2043), Workload(512, 1024)), "cpu": (Workload(12, 32),)}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Compare each layout with layers that share nothing, each with its own prefill."""
    kind = torch.device(device).type
    if kind == "cuda":
        config = DecoderConfig(vocab_size=32000, **llama(2048, 22, 32, 4, 5632, max_positions=4096))
    else:
        config = DecoderConfig(vocab_size=64, **llama(32, 4, 4, 2, 64, max_positions=128))
    pair = Pair(Side("full attention, SDPA", config, kernels=False), device, dtype)
    half = config.layers // 2
    for work in WORKLOADS[kind]:
        for layout in LAYOUTS:
            trained = {"cross_layer": {"layout": layout, "kv_layers": half}}
            name = f"{layout}, {half} of {config.layers} KV layers"
            yield pair.line(Side(name, config, trained), work, PAPER)
