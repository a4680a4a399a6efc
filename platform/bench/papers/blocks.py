"""The Block Transformer with 1.2B parameters beside a vanilla model of equal loss (2406.02657)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvlab.methods.decoder.config import DecoderConfig, gpt_neox
from kvlab.platform.bench.line import Line
from kvlab.platform.bench.papers.side import Pair, Side, Workload

VOCABULARY = 50304
SIZES = {"cuda": ((2048, 24, 16), (1024, 24, 16)), "cpu": ((32, 4, 4), (32, 4, 4))}
"""Width, layers and heads of the two; half of the first's layers make the block decoder."""
WORKLOADS = {
    "cuda": (
        (Workload(128, 2048), "10.2x, both with FlashAttention-2; 12.2x without"),
        (Workload(2048, 128), "10.4x, both with FlashAttention-2; 15.5x without"),
        (Workload(1024, 1024), "not in the paper"),
    ),
    "cpu": ((Workload(8, 48), "not in the paper"),),
}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Compare both at the paper's lengths."""
    kind = torch.device(device).type
    wide, narrow = (
        DecoderConfig(
            vocab_size=VOCABULARY if kind == "cuda" else 64,
            **{**gpt_neox(*sizes), "max_positions": 4096},
        )
        for sizes in SIZES[kind]
    )
    ours = Side(
        "Block Transformer 1.2B",
        wide,
        {"block_transformer": {"block_length": 4, "prefix_length": 2, "embedder": "lookup"}},
    )
    pair = Pair(Side("vanilla 302M, SDPA", narrow, kernels=False), device, dtype)
    for work, paper in WORKLOADS[kind]:
        yield pair.line(ours, work, paper)
