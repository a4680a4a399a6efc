"""Whole numbers of rows out of real ones: totals conserved, no layer starved."""

from __future__ import annotations

import torch
from torch import Tensor


def divide(wanted: Tensor, total: Tensor, least: int, most: Tensor | int) -> Tensor:
    """Round rows [B, K] so that each sample's sum is exactly its total, within least and most.

    Layers below `least` are raised, above `most` lowered; what that costs or frees the others take
    or give in proportion to what they have above `least`. Rounded down first; the largest
    remainders, the lower layer first, get what is left. Deterministic.

    Args:
        wanted: [B, K] float64, of any sum.
        total: [B] int64; brought within [K least, K most].
        most: of every layer, or [B] of each sample's.

    Returns:
        [B, K] int64.
    """
    layers = wanted.shape[1]
    most = torch.as_tensor(most).clamp(min=least).view(-1, 1)
    total = total[:, None].clamp(min=layers * least).minimum(layers * most)
    rows = wanted.double()
    for _ in range(2 * layers):  # each round fixes at least one layer or ends
        rows = rows.clamp(min=least).minimum(most.double())
        missing = total - rows.sum(1, keepdim=True)
        if bool((missing.abs() < 1e-9).all()):
            break
        room = torch.where(missing > 0, most - rows, rows - least)
        weight = torch.where(room > 0, rows - least + 1e-9, torch.zeros_like(rows))
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        rows = rows + weight * missing
    whole = (rows + 1e-9).floor().long().clamp(min=least).minimum(most)
    return _hand_out(whole, rows - whole, total, most)


def _hand_out(whole: Tensor, remainders: Tensor, total: Tensor, most: Tensor) -> Tensor:
    """Give one row each to the largest remainders, as often as it takes."""
    while bool((left := total - whole.sum(1, keepdim=True)).any()):
        open_ = whole < most
        order = remainders.masked_fill(~open_, -1.0).argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(whole.shape[1]).expand_as(order)
        )
        whole = whole + ((place < left) & open_)
    return whole
