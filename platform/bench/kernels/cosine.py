"""The residual's addition with its cosine, of all rows of a prompt (SqueezeAttention)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.similarity import add_with_cosine
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.line import Line

WIDTH = {"cuda": 4096, "cpu": 48}
GRID = {"cuda": ((8, 2048), (32, 512), (1, 2048), (128, 1)), "cpu": ((2, 8),)}
"""Batch and rows."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure at a 7B model's width."""
    bench = Bench(device)
    kind = bench.device.type
    width = WIDTH[kind]
    yield from bench.run(
        (
            2 * batch * rows * width * dtype.itemsize,
            partial(layer, bench, batch, rows, width, dtype),
        )
        for batch, rows in GRID[kind]
    )


def layer(bench: Bench, batch: int, rows: int, width: int, dtype: torch.dtype) -> Case:
    """One size, beside torch's addition without a cosine, and with its own cosine after it."""
    before, delta = (
        torch.randn(batch, rows, width, device=bench.device, dtype=dtype) for _ in range(2)
    )

    def in_two() -> Tensor:
        after = before + delta
        return torch.nn.functional.cosine_similarity(before, after, dim=-1).mean(1)

    moved = 3 * before.numel() * before.element_size() + 8 * batch * rows
    return Case(
        "residual addition with cosine",
        {"batch": batch, "rows": rows, "width": width},
        partial(add_with_cosine, before, delta),
        moved,
        partial(correct, before, delta),
        rivals={"torch: add, cosine_similarity": in_two},
        held=True,
    )


def correct(before: Tensor, delta: Tensor) -> str:
    """The sum must be torch's; cosine and mean those of the sum in float32."""
    with poisoned():
        found = add_with_cosine(before, delta)
    after = before + delta
    with torch_only():
        wanted = add_with_cosine(before.float(), after.float() - before.float())
    return (
        apart(found.after, after, close=1e-6, names="sum")
        or apart(found.cosine, wanted.cosine, close=1e-4, names="cosine")
        or apart(found.mean, wanted.mean, close=1e-4, names="mean")
    )
