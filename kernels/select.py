"""Which rows of many are the best. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.kernels.choice import fused

INTEGERS = (torch.int32, torch.int64)


def best(
    scores: Tensor, most: int, *, above: float = float("-inf"), budgets: Tensor | None = None
) -> Tensor:
    """Return the numbers [..., most] int64 of the highest scores, in ascending order; then EMPTY.

    Of equal scores the first count as higher. NaN is never among the best.

    Args:
        scores: [..., S] float32.
        above: only scores higher than this count.
        budgets: [...] integer, so many at most of each row; None: `most`.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    if fused(scores):
        from kvlab.kernels.gpu import select as gpu

        return gpu.best(scores, most, above=above, budgets=budgets)
    refuse_scores(scores, most, budgets)
    count = scores.shape[-1]
    counts = scores > above
    order = _order(scores.masked_fill(~counts, float("-inf")))
    numbers = order.topk(min(most, count), dim=-1, sorted=budgets is not None).indices
    taken = counts.gather(-1, numbers)
    if budgets is not None:
        taken &= torch.arange(numbers.shape[-1], device=scores.device) < budgets.unsqueeze(-1)
    numbers = numbers.masked_fill(~taken, count).sort(dim=-1).values
    out = numbers.new_full((*scores.shape[:-1], most), EMPTY)
    out[..., : numbers.shape[-1]] = numbers.masked_fill(numbers == count, EMPTY)
    return out


def _order(scores: Tensor) -> Tensor:
    """Integers [..., S] in the order of scores without NaN, the first of equal ones the highest."""
    bits = (scores + 0.0).view(torch.int32)  # one zero only
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return order | torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)


def refuse_scores(scores: Tensor, most: int, budgets: Tensor | None) -> None:
    """Refuse what `best` cannot take."""
    if not scores.dim() or scores.dtype != torch.float32:
        raise ValueError(f"scores: must be float32 [..., S], found {scores.dtype}")
    if most < 1:
        raise ValueError(f"most: must be 1 or more, found {most}")
    if budgets is None:
        return
    if budgets.shape != scores.shape[:-1] or budgets.dtype not in INTEGERS:
        found = f"{budgets.dtype} {list(budgets.shape)}"
        raise ValueError(f"budgets: must be integers {list(scores.shape[:-1])}, found {found}")
    if budgets.device != scores.device:
        raise ValueError(f"budgets: must lie on {scores.device}, found {budgets.device}")
