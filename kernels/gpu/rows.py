"""What the attention kernels share: which keys a tile may read, and loading them as stored.

A tile has BLOCK_M query rows: BLOCK_T tokens times GROUP heads that read one KV head, heads
innermost. A tensor comes as (pointer, its strides in elements) without the last, which is 1. Rows
in few bits come as (codes, scale, low, the recent row of each slot): codes of BITS, in key groups
of SLOTS, value groups of CHANNELS.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lines(x: tl.tensor, sample: tl.tensor, head: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Pointers to where rows [N] of a tensor begin."""
    first, by_sample, by_head, by_row = x
    return first + (sample * by_sample + head * by_head + rows.to(tl.int64) * by_row)


@triton.jit
def standing(
    at: tl.tensor, sample: tl.tensor, head: tl.tensor, rows: tl.tensor, live: tl.tensor
) -> tl.tensor:
    """Positions of rows as int32; below 0 where `live` is false."""
    return tl.load(lines(at, sample, head, rows), mask=live, other=-1).to(tl.int32)


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
        stored = tl.load(lines(table, sample, head, rows), mask=live, other=0).to(tl.int64)
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
    d = tl.arange(0, BLOCK_D)
    begin = lines(q, sample, head.to(tl.int64), t)
    mask = known[:, None] & (d < D)[None, :]
    return tl.load(begin[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def widen(x: tl.tensor, DTYPE: tl.constexpr, FLOAT8: tl.constexpr) -> tl.tensor:
    """Stored numbers in another dtype; the bytes of 8-bit floats come out 256 times too small."""
    if FLOAT8:
        bits = x.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = bits.to(tl.float16, bitcast=True)
    return x if x.dtype == DTYPE else x.to(tl.float32).to(DTYPE)


@triton.jit
def decoded(codes: tl.tensor, scale: tl.tensor, low: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """`dequantise` for a tile."""
    x = (codes.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
    return (x.to(tl.float32) + low.to(tl.float32)).to(DTYPE)


@triton.jit
def decoded_keys(
    few: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Channels d of the keys in BLOCK_N slots from `first` on, by their codes.

    Slots that share a byte, and runs of slots that share a scale, load it once.
    """
    codes, scale, low, _ = few
    PER: tl.constexpr = 8 // BITS
    MOST: tl.constexpr = 3 if BITS == 2 else 15
    DIVISOR: tl.constexpr = SLOTS & -SLOTS
    RUN: tl.constexpr = DIVISOR if DIVISOR < BLOCK_N else BLOCK_N
    slot = first + tl.arange(0, BLOCK_N // PER) * PER
    begin = lines(codes, sample, head, slot // SLOTS) + slot % SLOTS // PER * D
    mask = (slot < end)[:, None] & inside[None, :]
    packed = tl.load(begin[:, None] + d[None, :], mask=mask, other=0)
    x = (packed[:, None, :] >> (tl.arange(0, PER) * BITS)[None, :, None]) & MOST
    slot = first + tl.arange(0, BLOCK_N // RUN) * RUN
    mask = (slot < end)[:, None] & inside[None, :]
    begin = lines(scale, sample, head, slot // SLOTS)
    s = tl.load(begin[:, None] + d[None, :], mask=mask, other=0.0)
    begin = lines(low, sample, head, slot // SLOTS)
    least = tl.load(begin[:, None] + d[None, :], mask=mask, other=0.0)
    x = tl.reshape(x, [BLOCK_N // RUN, RUN, d.shape[0]])
    return tl.reshape(decoded(x, s[:, None, :], least[:, None, :], DTYPE), [BLOCK_N, d.shape[0]])


@triton.jit
def decoded_values(
    few: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Values of rows [N] by their codes; each byte and each scale is loaded once."""
    codes, scale, low, _ = few
    PER: tl.constexpr = 8 // BITS
    MOST: tl.constexpr = 3 if BITS == 2 else 15
    RUN: tl.constexpr = BLOCK_D if CHANNELS == D else CHANNELS & -CHANNELS
    byte = tl.arange(0, BLOCK_D // PER)
    mask = live[:, None] & (byte * PER < D)[None, :]
    begin = lines(codes, sample, head, rows)
    packed = tl.load(begin[:, None] + byte[None, :], mask=mask, other=0)
    x = (packed[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & MOST
    run = tl.arange(0, BLOCK_D // RUN) * RUN
    mask = live[:, None] & (run < D)[None, :]
    group = run // CHANNELS
    begin = lines(scale, sample, head, rows)
    s = tl.load(begin[:, None] + group[None, :], mask=mask, other=0.0)
    begin = lines(low, sample, head, rows)
    least = tl.load(begin[:, None] + group[None, :], mask=mask, other=0.0)
    x = tl.reshape(x, [rows.shape[0], BLOCK_D // RUN, RUN])
    return tl.reshape(decoded(x, s[:, :, None], least[:, :, None], DTYPE), [rows.shape[0], BLOCK_D])


@triton.jit
def load_columns(
    x: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
) -> tl.tensor:
    """Numbers d of stored rows [N] without their scale, zero where not `live` or not `inside`."""
    begin = lines(x, sample, head, stored)
    mask = live[:, None] & inside[None, :]
    return widen(tl.load(begin[:, None] + d[None, :], mask=mask, other=0), DTYPE, FLOAT8)


@triton.jit
def load_values(
    v: tl.tensor,
    few: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Values [N, BLOCK_D] of rows without their scale, zero where `live` is false."""
    d = tl.arange(0, BLOCK_D)
    if few is None:
        x = load_columns(v, sample, head, stored, live, d, d < D, DTYPE, FLOAT8)
    else:
        recent = standing(few[3], sample, head, rows, live)
        coded = live & (recent < 0)
        x = decoded_values(few, sample, head, rows, coded, D, BLOCK_D, DTYPE, BITS, CHANNELS)
        own = load_columns(v, sample, head, recent, recent >= 0, d, d < D, DTYPE, FLOAT8)
        x = tl.where((recent >= 0)[:, None], own, x)
    return x


@triton.jit
def key_columns(
    k: tl.tensor,
    few: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    d: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Numbers d of keys [N] as they are kept, without their scale; zero where not `inside`."""
    if few is None:
        x = load_columns(k, sample, head, stored, live, d, inside, DTYPE, FLOAT8)
    else:
        N: tl.constexpr = live.shape[0]
        recent = standing(few[3], sample, head, first + tl.arange(0, N), live)
        x = decoded_keys(few, sample, head, first, end, d, inside, D, N, DTYPE, BITS, SLOTS)
        own = load_columns(k, sample, head, recent, recent >= 0, d, inside, DTYPE, FLOAT8)
        x = tl.where((recent >= 0)[:, None], own, x)
    return x


@triton.jit
def load_keys(
    k: tl.tensor,
    few: tl.tensor,
    turn: tl.tensor,
    sample: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    stored: tl.tensor,
    live: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    FLOAT8: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tl.tensor:
    """Keys [N, BLOCK_D] of rows from `first` on without their scale; those not `live` are anything.

    They are rotated to where they stand if they are kept unrotated.
    """
    d = tl.arange(0, BLOCK_D)
    x = key_columns(
        k, few, sample, head, first, end, stored, live, d, d < D, D, DTYPE, FLOAT8, BITS, SLOTS
    )  # fmt: skip
    if turn is not None:
        at, at_sample, at_head, at_row, cos, sin, HALF, count = turn
        rows = first + tl.arange(0, live.shape[0])
        place = standing((at, at_sample, at_head, at_row), sample, head, rows, live)
        low = d < HALF
        other = tl.where(low, d + HALF, d - HALF)
        angle = tl.where(low, d, other)
        known = live & (place >= 0) & (place < count)
        turned = known[:, None] & (d < 2 * HALF)[None, :]
        entries = place.to(tl.int64)[:, None] * HALF + angle[None, :]
        c = tl.load(cos + entries, mask=turned, other=1.0)
        s = tl.load(sin + entries, mask=turned, other=0.0)
        y = key_columns(
            k, few, sample, head, first, end, stored, known, other, d < 2 * HALF, D, DTYPE,
            FLOAT8, BITS, SLOTS,
        )  # fmt: skip
        y = y.to(tl.float32) * tl.where(low[None, :], -s, s)
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
        begin = lines(scale, sample, head, stored)
        factor *= tl.load(begin, mask=live, other=0.0).to(tl.float32)
    return factor
