"""What the attention kernels share: which keys a tile may read, and loading them as stored.

A tile has BLOCK_M query rows: BLOCK_T tokens times GROUP heads that read one KV head, heads
innermost. A tensor comes as (pointer, its strides in elements) without the last, which is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def standing(
    at: tl.tensor, sample: tl.tensor, head: tl.tensor, rows: tl.tensor, live: tl.tensor
) -> tl.tensor:
    """Positions of rows as int32; below 0 where `live` is false."""
    first, by_sample, by_head, by_row = at
    offsets = sample * by_sample + head * by_head + rows.to(tl.int64) * by_row
    return tl.load(first + offsets, mask=live, other=-1).to(tl.int32)


@triton.jit
def readable(
    p: tl.tensor,
    j: tl.tensor,
    live: tl.tensor,
    window: tl.tensor,
    sinks: tl.tensor,
    STRICT: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tl.tensor:
    """`Rule.allows` for a tile: queries at p [M], keys at j [N], of which `live` hold something."""
    here, there = p[:, None], j[None, :]
    allowed = live[None, :] & ((there < here) if STRICT else (there <= here))
    if WINDOWED:
        allowed = allowed & ((here - there < window) | (there < sinks))
    return allowed


@triton.jit
def places(
    k_at: tl.tensor,
    table: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    PACKED: tl.constexpr,
) -> tl.tensor:
    """Where rows [N] of a cache stand, which of them hold something, and where they are stored."""
    live = rows < end
    j = rows
    if k_at is not None:
        j = standing(k_at, sample, head, rows, live)
        live = live & (j >= 0)
    stored = rows.to(tl.int64)
    if table is not None:
        first, by_sample, by_head, by_row = table
        offsets = sample * by_sample + head * by_head + stored * by_row
        stored = tl.load(first + offsets, mask=live, other=0).to(tl.int64)
    return j, live, stored


@triton.jit
def load_query(
    q: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    t: tl.tensor,
    known: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Query rows [M, BLOCK_D] of heads [M] and tokens t [M], zero where `known` is false."""
    first, by_sample, by_head, by_row = q
    d = tl.arange(0, BLOCK_D)
    offsets = sample * by_sample + head.to(tl.int64) * by_head + t.to(tl.int64) * by_row
    mask = known[:, None] & (d < D)[None, :]
    return tl.load(first + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def widen(x: tl.tensor, DTYPE: tl.constexpr, FLOAT8: tl.constexpr) -> tl.tensor:
    """Stored numbers in another dtype; the bytes of 8-bit floats come out 256 times too small."""
    if FLOAT8:
        bits = x.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = bits.to(tl.float16, bitcast=True)
    return x if x.dtype == DTYPE else x.to(tl.float32).to(DTYPE)


@triton.jit
def load_rows(
    x: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
) -> tl.tensor:
    """Rows [N, BLOCK_D] of keys or values without their scale, zero where `live` is false."""
    first, by_sample, by_head, by_row = x
    d = tl.arange(0, BLOCK_D)
    offsets = sample * by_sample + head * by_head + stored * by_row
    mask = live[:, None] & (d < D)[None, :]
    found = tl.load(first + offsets[:, None] + d[None, :], mask=mask, other=0)
    return widen(found, DTYPE, FLOAT8)


@triton.jit
def load_keys(
    k: tl.tensor,
    turn: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
) -> tl.tensor:
    """Keys as `load_rows` gives them, rotated to where they stand if they are kept unrotated."""
    x = load_rows(k, sample, head, stored, live, D, BLOCK_D, DTYPE, FLOAT8)
    if turn is not None:
        at, at_sample, at_head, at_row, cos, sin, HALF, count = turn
        first, by_sample, by_head, by_row = k
        place = standing((at, at_sample, at_head, at_row), sample, head, rows, live)
        d = tl.arange(0, BLOCK_D)
        low = d < HALF
        other = tl.where(low, d + HALF, d - HALF)
        angle = tl.where(low, d, other)
        known = live & (place >= 0) & (place < count)
        turned = known[:, None] & (d < 2 * HALF)[None, :]
        offsets = sample * by_sample + head * by_head + stored * by_row
        y = tl.load(first + offsets[:, None] + other[None, :], mask=turned, other=0)
        entries = place.to(tl.int64)[:, None] * HALF + angle[None, :]
        c = tl.load(cos + entries, mask=turned, other=1.0)
        s = tl.load(sin + entries, mask=turned, other=0.0)
        y = widen(y, DTYPE, FLOAT8).to(tl.float32) * tl.where(low[None, :], -s, s)
        x = (x.to(tl.float32) * c + y).to(DTYPE)
    return x


@triton.jit
def load_scale(
    scale: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    FLOAT8: tl.constexpr,
) -> tl.tensor:
    """What stored rows [N] are to be multiplied by, in float32."""
    factor = tl.where(live, 256.0 if FLOAT8 else 1.0, 0.0)
    if scale is not None:
        first, by_sample, by_head, by_row = scale
        offsets = sample * by_sample + head * by_head + stored * by_row
        factor *= tl.load(first + offsets, mask=live, other=0.0).to(tl.float32)
    return factor
