"""Attention over keys in blocks (arXiv 2205.14135), several programs to a query where they are few.

A program has a tile of query rows, one KV head and a part of the keys; `combine` adds the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernels.gpu.rows import (
    load_keys,
    load_query,
    load_scale,
    load_values,
    places,
    readable,
    standing,
)


@triton.jit(do_not_specialize=["T", "S", "window", "sinks"])
def forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    q_at: tl.tensor,
    k_at: tl.tensor,
    lengths: tl.tensor,
    table: tl.tensor,
    k_few: tl.tensor,
    v_few: tl.tensor,
    turn: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    window: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PACKED: tl.constexpr,
    ORDERED: tl.constexpr,
    STRICT: tl.constexpr,
    WINDOWED: tl.constexpr,
    FLOAT8: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Write out [parts, B, H, T, D_V] and lse [parts, B, H, T], in powers of 2.

    Args:
        q_at, k_at: (positions, strides). Neither: row t reads its past among rows of the same
            numbers (`PACKED`). No k_at otherwise: every row may be read. ORDERED: no row reads one
            of a higher number.
        lengths: (counts, strides) of rows that hold something; None: S.
        k_few, v_few: rows in few bits; k and v are then the recent rows. turn: see `load_keys`.
        scale: of the scores, log2(e) included. HEADS: query heads that read one KV head.
        GROUP: of these, how many are in a tile; a power of 2.
    """
    BLOCK_M: tl.constexpr = BLOCK_T * GROUP
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    tiles = (T + BLOCK_T - 1) // BLOCK_T * GROUPS
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest first
    pair = tl.program_id(0) // tiles
    sample, kv = (pair // KV).to(tl.int64), (pair % KV).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)

    m = tl.arange(0, BLOCK_M)
    t = tile // GROUPS * BLOCK_T + m // GROUP
    h = tile % GROUPS * GROUP + m % GROUP
    known = (t < T) & (h < HEADS)
    h = kv.to(tl.int32) * HEADS + h
    query = load_query(q, sample, h, t, known, D, BLOCK_D)
    p = tl.where(known, t, -1)
    if q_at is not None:
        p = standing((q_at[0], q_at[1], 0, q_at[2]), sample, kv, t, known)

    end = S
    if lengths is not None:
        held = tl.load(lengths[0] + sample * lengths[1] + kv * lengths[2]).to(tl.int32)
        end = tl.minimum(tl.maximum(held, 0), S)
    early, skipped = 0, 0
    if ORDERED:
        first = tile // GROUPS * BLOCK_T
        end = tl.minimum(end, first + BLOCK_T)
        if PACKED and WINDOWED:
            begin = tl.maximum(first - window + 1, 0) // BLOCK_N
            early = tl.minimum((sinks + BLOCK_N - 1) // BLOCK_N, begin)
            skipped = begin - early
    blocks = (end + BLOCK_N - 1) // BLOCK_N - skipped
    each = (blocks + parts - 1) // parts

    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for block in range(part * each, tl.minimum(part * each + each, blocks)):
        start = (block + tl.where(block < early, 0, skipped)) * BLOCK_N
        rows = start + tl.arange(0, BLOCK_N)
        j, live, stored = places(k_at, table, sample, kv, rows, end, PACKED)
        keys = load_keys(
            k, k_few, turn, sample, kv, start, end, stored, live, D, BLOCK_D, DTYPE, FLOAT8,
            BITS, SLOTS,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if FLOAT8 or k_scale is not None:
            scores *= load_scale(k_scale, sample, kv, stored, live, FLOAT8)[None, :]
        if PACKED or k_at is not None:
            allowed = readable(p, j, live, window, sinks, STRICT, WINDOWED)
        else:
            allowed = live[None, :] & known[:, None]
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(shares, 1)
        if FLOAT8 or v_scale is not None:
            shares *= load_scale(v_scale, sample, kv, stored, live, FLOAT8)[None, :]
        values = load_values(
            v, v_few, sample, kv, rows, stored, live, D_V, BLOCK_V, DTYPE, FLOAT8, BITS, CHANNELS
        )  # fmt: skip
        acc = tl.dot(shares.to(DTYPE), values, acc * fade[:, None], input_precision="ieee")
        most = higher

    pairs = tl.num_programs(0) // tiles
    line = (part * pairs // KV + sample) * (KV * HEADS) + h
    line = line * T + t
    d = tl.arange(0, BLOCK_V)
    found = acc / tl.where(total == 0, 1.0, total)[:, None]
    inside = known[:, None] & (d < D_V)[None, :]
    tl.store(out + line[:, None] * D_V + d[None, :], found, mask=inside)
    if lse is not None:
        tl.store(lse + line, most + tl.log2(total), mask=known)


@triton.jit(do_not_specialize=["parts"])
def combine(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    parts: tl.tensor,
    D_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Add the parts [parts, rows, D_V] of a row, weighed by what they hold of its softmax."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i, d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    lines = i * rows + row
    own = tl.load(partial_lse + lines, mask=i < parts, other=float("-inf"))
    most = tl.max(own, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    weights = tl.exp2(own - base)
    total = tl.sum(weights, 0)
    mask = (i < parts)[:, None] & (d < D_V)[None, :]
    x = tl.load(partial + lines[:, None] * D_V + d[None, :], mask=mask, other=0.0)
    found = tl.sum(x * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D_V + d, found, mask=d < D_V)
    if lse is not None:
        tl.store(lse + row, base + tl.log2(total))
