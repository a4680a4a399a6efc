"""A decode step's eviction: the row that ranks lowest gives its slot to the new one. Plain torch.

Positions are looked at as integers here, so ages are exact beyond 2^24 tokens too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.kernels.choice import fused
from kvlab.kernels.given import refuse_unlike

INTEGERS = (torch.int32, torch.int64)


class Stays(NamedTuple):
    """Which slots a step may not take, or takes first.

    recent: [B] or [n, B] integer: so many of the newest past rows stay whatever they rank; None:
        none.
    sinks: rows at positions below it stay.
    window: rows that stand so far or farther behind the new one leave first, whatever else holds:
        no later query can read them. Integer [n]: each layer's own, a large one where all can be
        read. None: all can be, in all layers.
    usable: [B] or [n, B] integer, slots of each sample that may be taken; None: all.
    """

    recent: Tensor | None = None
    sinks: int = 0
    window: int | Tensor | None = None
    usable: Tensor | None = None


def evict(
    positions: Tensor,
    newest: Tensor,
    stays: Stays,
    *,
    scores: Tensor | None = None,
    mass: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Take the slot of the row that ranks lowest for a new row; return it [..., B, H or 1, 1].

    A free slot is taken first; among equals, the first. Rows rank by their score, by what is known
    of their position, or by age. In place: scores grow by the mass, whose query heads are added up;
    then the slot stands at the new row's position, with a score of 0.

    Args:
        positions: [..., B, H or 1, C] integer, EMPTY in free slots; a leading dimension is that of
            KV layers.
        newest: [B] integer, the new rows' positions.
        stays: what does not leave.
        scores: like positions, float32; None: rows rank by what is known, or by age.
        mass: [B, H_q, S], attention that the first S slots received since the last step; H_q is a
            multiple of H. Of one layer alone, beside scores.
        known: [..., B, P] float32, what a row at each position scores; not beside scores.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    if fused(positions):
        from kvlab.kernels.gpu import evict as gpu

        return gpu.evict(positions, newest, stays, scores=scores, mass=mass, known=known)
    refuse(positions, newest, stays, scores, mass, known)
    if scores is not None and mass is not None:
        scores[..., : mass.shape[2]] += torch.unflatten(mass, 1, (scores.shape[1], -1)).sum(2)
    newest = newest.view(-1, 1, 1)
    ranks = rank(positions, newest, stays, scores, known)
    return take(
        unread_last(ranks, positions, newest, stays.window), positions, newest, stays.usable, scores
    )


def evict_and_write(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    newest: Tensor,
    stays: Stays,
    *,
    scores: Tensor | None = None,
    mass: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Do as `evict` does in one KV layer, and write the new row there.

    Args:
        cache_k, cache_v: [B, H, C, D] and [B, H, C, D_v], written in place.
        k, v: [B, H_kv, 1, D] and [B, H_kv, 1, D_v] of the same dtypes; H is a multiple of H_kv,
            whose rows are repeated.
        positions: [B, H or 1, C]. The others: see `evict`.

    Returns:
        The slots [B, H or 1, 1].
    """
    if fused(positions):
        from kvlab.kernels.gpu import evict as gpu

        return gpu.evict_and_write(
            cache_k, cache_v, k, v, positions, newest, stays,
            scores=scores, mass=mass, known=known,
        )  # fmt: skip
    refuse(positions, newest, stays, scores, mass, known)
    refuse_rows(cache_k, cache_v, k, v, positions)
    slots = evict(positions, newest, stays, scores=scores, mass=mass, known=known)
    write(cache_k, cache_v, k, v, slots)
    return slots


def write(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write one new row into slots [B, H or 1, 1]; see `evict_and_write`."""
    if fused(slots):
        from kvlab.kernels.gpu import evict as gpu

        gpu.write(cache_k, cache_v, k, v, slots)
        return
    refuse_rows(cache_k, cache_v, k, v, slots)
    for cache, row in ((cache_k, k), (cache_v, v)):
        rows = row.repeat_interleave(cache.shape[1] // row.shape[1], 1)
        cache.scatter_(2, slots.unsqueeze(-1).expand(rows.shape), rows)


def rank(
    positions: Tensor, newest: Tensor, stays: Stays, scores: Tensor | None, known: Tensor | None
) -> Tensor:
    """Rank rows [..., B, H or 1, C] as `evict` does, inf on what does not leave; readable or not.

    Args: newest: [B, 1, 1]. The others: see `evict`.
    """
    if scores is not None:
        ranks = scores
    elif known is not None:
        table = known.unsqueeze(-2).expand(*positions.shape[:-1], -1)
        ranks = table.gather(-1, positions.clamp_min(0).long())
    else:
        ranks = positions.double()
    if stays.recent is not None:
        first = newest - stays.recent[..., None, None]
        ranks = torch.where(positions >= first, float("inf"), ranks)
    return torch.where(positions < stays.sinks, float("inf"), ranks) if stays.sinks else ranks


def unread_last(
    ranks: Tensor, positions: Tensor, newest: Tensor, window: int | Tensor | None
) -> Tensor:
    """Rank rows lower than any other where no later query can read them, -inf where there is none.

    Args: newest: [B, 1, 1]. window: see `Stays`.
    """
    if window is not None:
        window = window[:, None, None, None] if isinstance(window, Tensor) else window
        lowest = torch.finfo(torch.float32).min
        ranks = ranks.masked_fill(positions <= newest - window, lowest)
    return ranks.masked_fill(positions == EMPTY, float("-inf"))


def take(
    ranks: Tensor, positions: Tensor, newest: Tensor, usable: Tensor | None, scores: Tensor | None
) -> Tensor:
    """Enter new rows, newest [B, 1, 1], where ranks are lowest; return the slots: see `evict`."""
    if usable is not None:
        slot = torch.arange(positions.shape[-1], device=positions.device)
        ranks = ranks.masked_fill(slot >= usable[..., None, None], float("inf"))
    slots = ranks.argmin(-1, keepdim=True)
    positions.scatter_(-1, slots, newest.to(positions.dtype).expand(slots.shape))
    if scores is not None:
        scores.scatter_(-1, slots, 0.0)
    return slots


def refuse(
    positions: Tensor,
    newest: Tensor,
    stays: Stays,
    scores: Tensor | None,
    mass: Tensor | None,
    known: Tensor | None,
) -> None:
    """Refuse what `evict` cannot take."""
    if positions.dim() not in (3, 4) or positions.dtype not in INTEGERS:
        found = f"{list(positions.shape)} {positions.dtype}"
        raise ValueError(f"positions: must be integers [B, H, C] or [n, B, H, C], found {found}")
    if not positions.shape[-1]:
        raise ValueError("positions: must have a slot at least, found none")
    shape, batch = positions.shape, positions.shape[-3]
    refuse_unlike("newest", newest, (batch,), positions, INTEGERS)
    for name, counts in (("stays.recent", stays.recent), ("stays.usable", stays.usable)):
        by_layer = counts is not None and counts.dim() == 2
        refuse_unlike(
            name, counts, tuple(shape[:-2]) if by_layer else (batch,), positions, INTEGERS
        )
    if isinstance(stays.window, Tensor):
        if len(shape) == 3:
            raise ValueError("stays.window: must be a number, of one layer, found a tensor")
        refuse_unlike("stays.window", stays.window, shape[:1], positions, INTEGERS)
    elif stays.window is not None and stays.window < 1:
        raise ValueError(f"stays.window: must be 1 or more, found {stays.window}")
    if scores is not None and known is not None:
        raise ValueError("known: must be None where scores are given")
    refuse_unlike("scores", scores, tuple(shape), positions)
    if known is not None:
        scored = (*shape[:-2], known.shape[-1] if known.dim() else 0)
        refuse_unlike("known", known, scored, positions)
    if mass is None:
        return
    if scores is None or scores.dim() != 3:
        raise ValueError("mass: must come with the scores [B, H, C] of one layer")
    heads, slots = (mass.shape[1], mass.shape[2]) if mass.dim() == 3 else (0, 0)
    refuse_unlike("mass", mass, (batch, heads, slots), positions)
    if not heads or heads % shape[1] or slots > shape[2]:
        wanted = f"a multiple of {shape[1]} heads and up to {shape[2]} slots"
        raise ValueError(f"mass: must have {wanted}, found {list(mass.shape)}")


def refuse_rows(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Refuse rows that do not fit a cache, or whose slots [B, H or 1, n] do not."""
    for name, cache, row in (("k", cache_k, k), ("v", cache_v, v)):
        if cache.dim() != 4 or row.dim() != 4:
            found = f"{list(cache.shape)} and {list(row.shape)}"
            raise ValueError(
                f"{name}: must be [B, H_kv, 1, D] for a cache [B, H, C, D], found {found}"
            )
        batch, heads, _, dim = cache.shape
        if not row.shape[1] or heads % row.shape[1]:
            raise ValueError(f"{name}: must have a divisor of {heads} heads, found {row.shape[1]}")
        refuse_unlike(name, row, (batch, row.shape[1], 1, dim), cache, (cache.dtype,))
        if cache.device != slots.device:
            raise ValueError(f"{name}: must lie on {slots.device}, found {cache.device}")
    batch, heads, capacity, _ = cache_k.shape
    if cache_v.shape[:3] != cache_k.shape[:3]:
        wanted = f"{[batch, heads, capacity]}, as cache_k"
        raise ValueError(f"cache_v: must begin with {wanted}, found {list(cache_v.shape)}")
    fits = slots.dim() == 3 and slots.shape[0] == batch and slots.shape[1] in (1, heads)
    if not fits or slots.shape[2] not in (1, capacity):
        wanted = f"[{batch}, {heads} or 1, {capacity} positions, or 1 slot]"
        raise ValueError(f"positions or slots: must be {wanted}, found {list(slots.shape)}")
