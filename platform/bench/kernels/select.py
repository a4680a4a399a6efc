"""The best of many rows, and rows put beside those of a layer: what ADORE chooses and reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.select import beside, best
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.kernels.decode import points
from kvlab.platform.bench.line import Line

GRID = {"cuda": ((32, 1, 64), (2048, 32768, 8192)), "cpu": ((2,), (24,))}
"""Batches, and tokens to choose from."""
KEPT = {"cuda": 192, "cpu": 8}
"""m, the value that readers of ADORE's paper report."""
REBUILT = {"cuda": 8, "cpu": 3}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure the choice, then what is read beside the kept rows; neither looks at the dtype."""
    bench = Bench(device)
    kind = bench.device.type
    most, rebuilt = KEPT[kind], REBUILT[kind]
    yield from bench.run(
        chain(
            (
                (8 * batch * tokens, partial(choice, bench, batch, tokens, most))
                for batch, tokens in points(*GRID[kind])
            ),
            ((0, partial(joined, bench, batch, most + 1, rebuilt)) for batch in GRID[kind][0]),
        )
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


def joined(bench: Bench, batch: int, slots: int, others: int) -> Case:
    """Some rows beside a layer's, one of them the layer's too, for a query of each and one more.

    Torch's cat of the positions stands beside it, without the mask.
    """
    order = torch.rand(batch, 8 * slots, device=bench.device).argsort(-1)
    held, extra = order[:, :slots], order[:, slots - 1 : slots - 1 + others]
    newest = order.new_full((batch, 1), 8 * slots)
    asking = torch.cat((extra, newest), dim=1)
    given = (asking, held, extra)
    keys = batch * (slots + others)
    return Case(
        "rows beside a layer's",
        {"batch": batch, "rows": slots, "others": others},
        partial(beside, *given),
        8 * (sum(x.numel() for x in given) + keys) + keys * (others + 1),
        partial(correct_joined, *given),
        rivals={"torch cat, without the mask": partial(torch.cat, (held, extra), 1)},
    )


def correct_joined(asking: Tensor, held: Tensor, extra: Tensor) -> str:
    """Positions and mask must be the twin's."""
    with poisoned():
        found = beside(asking, held, extra)
    with torch_only():
        return apart(found, beside(asking, held, extra), names="positions,mask")
