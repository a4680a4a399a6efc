"""A decode step's eviction: one launch for all samples and heads, each a program of its own.

A program goes through its slots once: scores grow, every slot's rank becomes an integer of the same
order, and the least of them stays beside its number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.evict import Stays, refuse, refuse_rows
from kvlab.kernels.gpu.ordered import INF, LOWEST, MINUS_INF, ordered

TILE = 4096
"""Most slots that a program looks at at a time."""


def evict(
    positions: Tensor,
    newest: Tensor,
    stays: Stays,
    *,
    scores: Tensor | None = None,
    mass: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Do as `kvlab.kernels.evict.evict` does, in one launch."""
    refuse(positions, newest, stays, scores, mass, known)
    return _launch(None, positions, newest, stays, scores, mass, known)


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
    """Do as `kvlab.kernels.evict.evict_and_write` does, in one launch."""
    refuse(positions, newest, stays, scores, mass, known)
    refuse_rows(cache_k, cache_v, k, v, positions)
    return _launch((cache_k, cache_v, k, v), positions, newest, stays, scores, mass, known)


def write(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Do as `kvlab.kernels.evict.write` does, in one launch."""
    refuse_rows(cache_k, cache_v, k, v, slots)
    batch, heads = cache_k.shape[:2]
    if not batch * heads:
        return
    sizes = _sizes(cache_k, cache_v, k, v)
    with torch.cuda.device_of(slots):
        _write_kernel[(batch * heads,)](
            cache_k, cache_v, k, v, slots, heads,
            *_row_strides(cache_k, cache_v, k, v),
            slots.stride(0), 0 if slots.shape[1] == 1 else slots.stride(1),
            **sizes, num_warps=1,
        )  # fmt: skip


def _launch(
    rows: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    positions: Tensor,
    newest: Tensor,
    stays: Stays,
    scores: Tensor | None,
    mass: Tensor | None,
    known: Tensor | None,
) -> Tensor:
    slots = torch.empty((*positions.shape[:-1], 1), device=positions.device, dtype=torch.int64)
    if not slots.numel():
        return slots
    held = positions.unsqueeze(0) if positions.dim() == 3 else positions
    _, batch, heads, capacity = held.shape
    ranking = scores if scores is not None else known
    ranks = held if ranking is None else ranking
    if ranks.dim() == (3 if known is None else 2):
        ranks = ranks.unsqueeze(0)
    rank_strides = ranks.stride() if known is None else (*ranks.stride()[:2], 0, ranks.stride(2))
    seen = scores if mass is None or scores is None else mass
    cache_k, cache_v, k, v = rows or (held[0].unsqueeze(-1),) * 4
    per = cache_k.shape[1] // heads
    windows = stays.window if isinstance(stays.window, Tensor) else None
    block = min(triton.next_power_of_2(capacity), TILE)
    with torch.cuda.device_of(held):
        _evict_kernel[(slots.numel(),)](
            held, ranks, ranks if seen is None else seen, newest,
            newest if stays.recent is None else stays.recent,
            newest if stays.usable is None else stays.usable,
            newest if windows is None else windows,
            slots, cache_k, cache_v, k, v,
            batch, heads, capacity, 0 if mass is None else mass.shape[2], ranks.shape[-1],
            stays.sinks, (stays.window or 0) if windows is None else 0,
            *held.stride(), *rank_strides,
            *((0, 0, 0) if mass is None else mass.stride()),
            newest.stride(0),
            *_by_layer(stays.recent), *_by_layer(stays.usable),
            0 if windows is None else windows.stride(0),
            *_row_strides(cache_k, cache_v, k, v),
            SCORED=scores is not None, KNOWN=known is not None,
            GROUP=0 if mass is None else mass.shape[1] // heads,
            RECENT=stays.recent is not None, WINDOW=stays.window is not None,
            EACH=windows is not None, USABLE=stays.usable is not None, WRITES=rows is not None,
            PER=per, BLOCK_H=triton.next_power_of_2(per), **_sizes(cache_k, cache_v, k, v),
            BLOCK=block, num_warps=8 if block >= 2048 else 4 if block >= 512 else 1,
        )  # fmt: skip
    return slots


def _sizes(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    return {
        "REPEAT_K": cache_k.shape[1] // k.shape[1],
        "REPEAT_V": cache_v.shape[1] // v.shape[1],
        "DIM_K": k.shape[3],
        "DIM_V": v.shape[3],
        "BLOCK_K": triton.next_power_of_2(k.shape[3]),
        "BLOCK_V": triton.next_power_of_2(v.shape[3]),
    }


def _by_layer(counts: Tensor | None) -> tuple[int, int]:
    """The strides of [B] or [n, B]."""
    if counts is None:
        return 0, 0
    return 0 if counts.dim() == 1 else counts.stride(0), counts.stride(-1)


def _row_strides(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor) -> list[int]:
    """Of both caches [B, H, C, D]; of both rows, without that of their one row."""
    strides = [*cache_k.stride(), *cache_v.stride()]
    for row in (k, v):
        strides += [row.stride(0), row.stride(1), row.stride(3)]
    return strides


@triton.jit
def _copy(
    from_ptr, to_ptr, heads, there, slot, from_head, from_column, to_head, to_row, to_column,
    REPEAT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one row of heads [n, 1] of a sample."""
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    mask = there & (column < DIM)
    x = tl.load(from_ptr + heads // REPEAT * from_head + column * from_column, mask=mask)
    tl.store(to_ptr + heads * to_head + slot * to_row + column * to_column, x, mask=mask)


@triton.jit
def _evict_kernel(
    positions_ptr, ranks_ptr, mass_ptr, newest_ptr, recent_ptr, usable_ptr, windows_ptr, slots_ptr,
    cache_k_ptr, cache_v_ptr, k_ptr, v_ptr,
    batch, heads, capacity, seen, reach, sinks, window,
    positions_layer, positions_sample, positions_head, positions_slot,
    ranks_layer, ranks_sample, ranks_head, ranks_slot,
    mass_sample, mass_head, mass_slot, newest_sample,
    recent_layer, recent_sample, usable_layer, usable_sample, windows_layer,
    cache_k_sample, cache_k_head, cache_k_row, cache_k_column,
    cache_v_sample, cache_v_head, cache_v_row, cache_v_column,
    k_sample, k_head, k_column, v_sample, v_head, v_column,
    SCORED: tl.constexpr, KNOWN: tl.constexpr, GROUP: tl.constexpr, RECENT: tl.constexpr,
    WINDOW: tl.constexpr, EACH: tl.constexpr, USABLE: tl.constexpr, WRITES: tl.constexpr,
    PER: tl.constexpr, BLOCK_H: tl.constexpr, REPEAT_K: tl.constexpr, REPEAT_V: tl.constexpr,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head, sample = program % heads, program // heads % batch
    layer = program // heads // batch
    positions_ptr += layer * positions_layer + sample * positions_sample + head * positions_head
    ranks_ptr += layer * ranks_layer + sample * ranks_sample + head * ranks_head
    newest = tl.load(newest_ptr + sample * newest_sample).to(tl.int64)
    if EACH:
        window = tl.load(windows_ptr + layer * windows_layer).to(tl.int64)
    best = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    best_slot = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mask = slot < capacity
        place = tl.load(positions_ptr + slot.to(tl.int64) * positions_slot, mask=mask, other=-1)
        place = place.to(tl.int64)
        if SCORED:
            score_at = ranks_ptr + slot.to(tl.int64) * ranks_slot
            score = tl.load(score_at, mask=mask, other=0.0)
            if GROUP > 0:
                grown = tl.full((BLOCK,), 0.0, tl.float32)
                mass_at = mass_ptr + sample * mass_sample + head * GROUP * mass_head
                mass_at += slot.to(tl.int64) * mass_slot
                for _ in range(GROUP):
                    grown += tl.load(mass_at, mask=slot < seen, other=0.0)
                    mass_at += mass_head
                score += grown
                tl.store(score_at, score, mask=slot < seen)
            rank = ordered(score)
        elif KNOWN:
            there = (place >= 0) & (place < reach)
            found = tl.load(ranks_ptr + place * ranks_slot, mask=there, other=0.0)
            rank = ordered(found)
        else:
            rank = place.to(tl.int32)  # below INF
        stays = place < sinks
        if RECENT:
            recent_at = recent_ptr + layer * recent_layer + sample * recent_sample
            recent = tl.load(recent_at).to(tl.int64)
            stays = stays | (place >= newest - recent)
        rank = tl.where(stays, INF, rank)
        if WINDOW:
            rank = tl.where(place <= newest - window, LOWEST, rank)
        rank = tl.where(place < 0, MINUS_INF, rank)
        if USABLE:
            usable_at = usable_ptr + layer * usable_layer + sample * usable_sample
            usable = tl.load(usable_at).to(tl.int64)
            rank = tl.where(slot < usable, rank, INF)
        rank = tl.where(mask, rank, INF)
        better = rank < best
        best_slot = tl.where(better, slot, best_slot)
        best = tl.where(better, rank, best)
    lowest = tl.min(best, 0)
    slot = tl.min(tl.where(best == lowest, best_slot, 0x7FFFFFFF), 0).to(tl.int64)
    tl.debug_barrier()  # the slot's grown score is stored before it is cleared
    tl.store(slots_ptr + program, slot)
    tl.store(positions_ptr + slot * positions_slot, newest.to(positions_ptr.dtype.element_ty))
    if SCORED:
        tl.store(ranks_ptr + slot * ranks_slot, 0.0)
    if WRITES:
        written = (head * PER + tl.arange(0, BLOCK_H))[:, None]
        there = (tl.arange(0, BLOCK_H) < PER)[:, None]
        _copy(
            k_ptr + sample * k_sample, cache_k_ptr + sample * cache_k_sample, written, there, slot,
            k_head, k_column, cache_k_head, cache_k_row, cache_k_column,
            REPEAT_K, DIM_K, BLOCK_K,
        )  # fmt: skip
        _copy(
            v_ptr + sample * v_sample, cache_v_ptr + sample * cache_v_sample, written, there, slot,
            v_head, v_column, cache_v_head, cache_v_row, cache_v_column,
            REPEAT_V, DIM_V, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _write_kernel(
    cache_k_ptr, cache_v_ptr, k_ptr, v_ptr, slots_ptr, heads,
    cache_k_sample, cache_k_head, cache_k_row, cache_k_column,
    cache_v_sample, cache_v_head, cache_v_row, cache_v_column,
    k_sample, k_head, k_column, v_sample, v_head, v_column, slots_sample, slots_head,
    REPEAT_K: tl.constexpr, REPEAT_V: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, head = program // heads, program % heads
    slot = tl.load(slots_ptr + sample * slots_sample + head * slots_head).to(tl.int64)
    written = head + tl.full((1, 1), 0, tl.int64)
    _copy(
        k_ptr + sample * k_sample, cache_k_ptr + sample * cache_k_sample, written, written >= 0,
        slot, k_head, k_column, cache_k_head, cache_k_row, cache_k_column,
        REPEAT_K, DIM_K, BLOCK_K,
    )  # fmt: skip
    _copy(
        v_ptr + sample * v_sample, cache_v_ptr + sample * cache_v_sample, written, written >= 0,
        slot, v_head, v_column, cache_v_head, cache_v_row, cache_v_column,
        REPEAT_V, DIM_V, BLOCK_V,
    )  # fmt: skip
