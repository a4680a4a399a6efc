"""The token decoder's step: one query over the few rows of its block, for a batch of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.tokens import attend_block
from kvlab.platform.bench.kernels.case import Bench, Case, sdpa
from kvlab.platform.bench.kernels.decode import Heads, agrees, traffic
from kvlab.platform.bench.line import Line

HEADS = {"cuda": Heads(16, 16, 128), "cpu": Heads(4, 4, 16)}
"""Of the Block Transformer with 1.2B parameters."""
BLOCKS = {"cuda": (512, 2048, 128, 32), "cpu": (6,)}
ROWS = (5, 3)
"""Rows of a block of 4 tokens behind 2 prefixes: at its last token, and at its second."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure many blocks first: the batches that the method is for."""
    bench = Bench(device)
    kind = bench.device.type
    heads = HEADS[kind]
    yield from bench.run(
        (
            2 * blocks * heads.kv * ROWS[0] * heads.dim * dtype.itemsize,
            partial(step, bench, heads, blocks, rows, dtype),
        )
        for rows in ROWS
        for blocks in BLOCKS[kind]
    )


def step(bench: Bench, heads: Heads, blocks: int, rows: int, dtype: torch.dtype) -> Case:
    """One size: the rows so far of storages that have room for all."""
    q = torch.randn(blocks, heads.q, 1, heads.dim, device=bench.device, dtype=dtype)
    held = torch.randn(2, blocks, heads.kv, ROWS[0], heads.dim, device=bench.device, dtype=dtype)
    k, v = held[:, :, :, :rows]
    return Case(
        "token decoder's attention",
        {"batch": blocks, "rows": rows},
        partial(attend_block, q, k, v),
        traffic(q, k, v),
        partial(agrees, lambda: [attend_block(q, k, v)], q, partial(exact, q, k, v)),
        rivals=sdpa(q, k, v),
        held=blocks >= BLOCKS["cuda"][0],
    )


def exact(q: Tensor, k: Tensor, v: Tensor, at: list[int]) -> list[Tensor]:
    """What the twin answers in float32 for some blocks."""
    with torch_only():
        return [attend_block(*(x[at].float() for x in (q, k, v)))]
