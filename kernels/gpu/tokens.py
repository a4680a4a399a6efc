"""Attention of one query over the few rows of a block: a program takes several blocks at a time.

The keys and values of one KV head are read once and kept in registers, while the query heads that
share them take their turns. A row is a few hundred bytes, so tensor cores would gain nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.tokens import refuse

TILE = 4096
"""Numbers of the keys that a program holds, where one block has no more."""


def attend_block(q: Tensor, k: Tensor, v: Tensor, held: Tensor | None = None) -> Tensor:
    """Do as `kvlab.kernels.tokens.attend_block` does, in one launch; sums are in float32."""
    refuse(q, k, v, held)
    count, heads, _, dim = q.shape
    kv_heads, rows, value_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty((count, heads, 1, value_dim), device=q.device, dtype=q.dtype)
    if not count:
        return out
    block_r, block_d = triton.next_power_of_2(rows), triton.next_power_of_2(max(dim, value_dim))
    at_once = min(max(1, TILE // (block_r * block_d)), triton.next_power_of_2(count))
    tile = at_once * block_r * block_d
    with torch.cuda.device_of(q):
        _block_kernel[(triton.cdiv(count, at_once), kv_heads)](
            q, k, v, q if held is None else held, out, count, rows,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
            0 if held is None else held.stride(0), math.log2(math.e) * dim**-0.5,
            GROUP=heads // kv_heads, HELD=held is not None, DIM=dim, VALUE_DIM=value_dim,
            BLOCK_N=at_once, BLOCK_R=block_r, BLOCK_D=block_d,
            num_warps=4 if tile <= 4096 else 8 if tile <= 16384 else 16,
        )  # fmt: skip
    return out


@triton.jit
def _block_kernel(
    q_ptr, k_ptr, v_ptr, held_ptr, out_ptr, count, rows,
    q_block, q_head, k_block, k_head, k_row, v_block, v_head, v_row, out_block, out_head,
    held_block, scale,
    GROUP: tl.constexpr, HELD: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head = tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, BLOCK_R).to(tl.int64), tl.arange(0, BLOCK_D)
    there = (block < count)[:, None] & (row < rows)[None, :]
    if HELD:
        held = tl.load(held_ptr + block * held_block, mask=block < count, other=0)
        there = there & (row[None, :] < held[:, None])
    k_at = k_ptr + kv_head * k_head + block[:, None, None] * k_block + row[None, :, None] * k_row
    k = tl.load(
        k_at + column[None, None, :],
        mask=there[:, :, None] & (column < DIM)[None, None, :],
        other=0.0,
    ).to(tl.float32)
    v_at = v_ptr + kv_head * v_head + block[:, None, None] * v_block + row[None, :, None] * v_row
    v = tl.load(
        v_at + column[None, None, :],
        mask=there[:, :, None] & (column < VALUE_DIM)[None, None, :],
        other=0.0,
    ).to(tl.float32)
    live = (block < count)[:, None]
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_at = q_ptr + block[:, None] * q_block + head * q_head + column[None, :]
        q = tl.load(q_at, mask=live & (column < DIM)[None, :], other=0.0).to(tl.float32) * scale
        scores = tl.where(there, tl.sum(q[:, None, :] * k, 2), float("-inf"))
        most = tl.max(scores, 1)
        most = tl.where(most > float("-inf"), most, 0.0)
        shares = tl.where(there, tl.exp2(scores - most[:, None]), 0.0)
        total = tl.sum(shares, 1)
        mixed = tl.sum(shares[:, :, None] * v, 1) / tl.where(total > 0.0, total, 1.0)[:, None]
        out_at = out_ptr + block[:, None] * out_block + head * out_head + column[None, :]
        out = mixed.to(out_ptr.dtype.element_ty)
        tl.store(out_at, out, mask=live & (column < VALUE_DIM)[None, :])
