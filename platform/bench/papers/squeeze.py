"""SqueezeAttention over two evictions on a model of Mistral 7B's shape (2404.04793)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.papers.side import Pair, Side, Workload

SHARE = 0.2
"""Of prompt and generation, kept in a layer on average."""
EVICTIONS: dict[str, dict[str, Any]] = {
    "sliding window": {"sliding_window": {}},
    "H2O": {"h2o": {}},
}
WORKLOADS = {
    "cuda": (
        (Workload(512, 1024), "up to 2.2x on Mistral 7B with 20 % kept, on 8 A100"),
        (Workload(5, 2043), "not in the paper"),
    ),
    "cpu": ((Workload(16, 48), "not in the paper"),),
}


def mistral(kind: str) -> DecoderConfig:
    """Mistral 7B's shape; a tiny one without a GPU."""
    if kind == "cuda":
        sizes = llama(4096, 32, 32, 8, 14336, max_positions=4096)
        return DecoderConfig(vocab_size=32000, **sizes)
    return DecoderConfig(vocab_size=64, **llama(32, 4, 4, 2, 64, max_positions=128))


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Compare each with full attention on the same weights."""
    kind = torch.device(device).type
    config = mistral(kind)
    pair = Pair(Side("full attention, SDPA", config, kernels=False), device, dtype)
    for work, paper in WORKLOADS[kind]:
        kept = int(SHARE * (work.prompt + work.generate))
        for name, eviction in EVICTIONS.items():
            applied = {**eviction, "squeeze_attention": {"tokens": kept}}
            side = Side(f"SqueezeAttention over {name}, {kept:,} rows", config, applied=applied)
            yield pair.line(side, work, paper)
