"""What attention every key receives, from the queries' log-sum-exp: no matrix of queries by keys.

A program has a block of keys of one KV head and goes through the queries in order, so that the sum
is the same every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvlab.kernels.gpu.rows import (
    load_keys,
    load_query,
    load_scale,
    places,
    readable,
    standing,
)


@triton.jit(do_not_specialize=["T", "S", "window", "sinks", "start", "stop"])
def weigh(
    q: tl.tensor,
    k: tl.tensor,
    k_scale: tl.tensor,
    q_at: tl.tensor,
    k_at: tl.tensor,
    lengths: tl.tensor,
    table: tl.tensor,
    k_few: tl.tensor,
    turn: tl.tensor,
    lse: tl.tensor,
    mass: tl.tensor,
    T: tl.tensor,
    S: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    window: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    ORDERED: tl.constexpr,
    STRICT: tl.constexpr,
    WINDOWED: tl.constexpr,
    FLOAT8: tl.constexpr,
    BITS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Write mass [B, H, S]: the probabilities of every key, summed over rows start to stop of T.

    Args: as in `forward`. lse: [B, H, T], in powers of 2.
    """
    BLOCK_M: tl.constexpr = BLOCK_T * GROUP
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    blocks = (S + BLOCK_N - 1) // BLOCK_N
    tiles = blocks * GROUPS
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    sample, kv = (pair // KV).to(tl.int64), (pair % KV).to(tl.int64)
    block = tile // GROUPS
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)

    end = S
    if lengths is not None:
        held = tl.load(lengths[0] + sample * lengths[1] + kv * lengths[2]).to(tl.int32)
        end = tl.minimum(tl.maximum(held, 0), S)
    j, live, stored = places(k_at, table, sample, kv, rows, end, PACKED)
    keys = load_keys(
        k, k_few, turn, sample, kv, block * BLOCK_N, end, stored, live, D, BLOCK_D, DTYPE, FLOAT8,
        BITS, SLOTS,
    )  # fmt: skip
    factor = load_scale(k_scale, sample, kv, stored, live, FLOAT8) * scale

    m = tl.arange(0, BLOCK_M)
    own = tile % GROUPS * GROUP + m % GROUP
    h = kv.to(tl.int32) * HEADS + own
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ORDERED:
        start = tl.maximum(start, block * BLOCK_N)
        if PACKED and WINDOWED:
            reach = block * BLOCK_N + BLOCK_N + tl.minimum(window, S)
            stop = tl.where(block * BLOCK_N < sinks, stop, tl.minimum(stop, reach))
    for begin in range(start, stop, BLOCK_T):
        t = begin + m // GROUP
        known = (t < stop) & (own < HEADS)
        query = load_query(q, sample, h, t, known, D, BLOCK_D)
        offsets = (sample * (KV * HEADS) + h) * T + t
        most = tl.load(lse + offsets, mask=known, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * factor[None, :]
        if PACKED or k_at is not None:
            p = tl.where(known, t, -1)
            if q_at is not None:
                p = standing((q_at[0], q_at[1], 0, q_at[2]), sample, kv, t, known)
            allowed = readable(p, j, live, window, sinks, STRICT, WINDOWED)
        else:
            allowed = live[None, :] & known[:, None]
        acc += tl.where(allowed, tl.exp2(scores - most[:, None]), 0.0)

    summed = tl.sum(tl.reshape(acc, [BLOCK_T, GROUP, BLOCK_N]), 0)
    g = tile % GROUPS * GROUP + tl.arange(0, GROUP)
    lines = (sample * KV + kv) * HEADS + g
    inside = (g < HEADS)[:, None] & (rows < S)[None, :]
    tl.store(mass + lines[:, None] * S + rows[None, :], summed, mask=inside)
