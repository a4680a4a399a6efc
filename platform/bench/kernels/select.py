"""The best of many rows: what ADORE rebuilds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.select import best
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.kernels.decode import points
from kvlab.platform.bench.line import Line

GRID = {"cuda": ((32, 1, 64), (2048, 32768, 8192)), "cpu": ((2,), (24,))}
"""Batches, and tokens to choose from."""
MOST = {"cuda": (8, 192), "cpu": (3, 8)}
"""What a step rebuilds, and m, the value that readers of ADORE's paper report."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure the choice, which does not look at the dtype."""
    bench = Bench(device)
    kind = bench.device.type
    yield from bench.run(
        (8 * batch * tokens, partial(choice, bench, batch, tokens, most))
        for batch, tokens in points(*GRID[kind])
        for most in MOST[kind]
    )


def choice(bench: Bench, batch: int, tokens: int, most: int) -> Case:
    """The best of random scores, a few of them equal; beside topk, whose numbers are sorted."""
    scores = torch.randn(batch, tokens, device=bench.device).mul(4096).round().div(4096)

    def sorted_topk() -> Tensor:
        return scores.topk(most).indices.sort(-1).values

    return Case(
        "the best of many rows",
        {"batch": batch, "tokens": tokens, "best": most},
        partial(best, scores, most),
        4 * scores.numel() + 8 * batch * most,
        partial(correct_choice, scores, most),
        rivals={"torch topk, sort": sorted_topk},
    )


def correct_choice(scores: Tensor, most: int) -> str:
    """The numbers must be the twin's, which takes the first of equal scores."""
    with poisoned():
        found = best(scores, most)
    with torch_only():
        return apart(found, best(scores, most), names="numbers")
