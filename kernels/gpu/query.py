"""The queries of a few rows in one launch: a skinny product whose epilogue norms and rotates.

The product reads the weight once, and takes as long as that. A program has some pairs of one head,
the two numbers of a pair side by side, so that it rotates in registers; all of them where a norm
needs the whole head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.query import DTYPES, MOST_DIM, Turn, refuse

PAIRS = 16
"""Of a program, where nothing needs the whole head."""
MOST_TILE = 64
"""Rows of a program; more are spread over programs."""
STAGE = 24576
"""Bytes of the operands that are loaded at a time; four such are under way."""


@torch.no_grad()
def project(
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    turn: Turn | None = None,
) -> Tensor:
    """Do as `kvlab.kernels.query.project` does, in one launch; sums are in float32.

    Raises:
        ValueError: as there; other dtypes than float32, bfloat16 and float16, or not that of x in
            the weight; an odd head or one of more than 256 numbers; gaps between the numbers.
    """
    refuse(x, weight, head_dim, bias, norm, turn)
    cos, sin = (None, None) if turn is None else turn
    _refuse(head_dim, x=x, weight=weight, bias=bias, norm=norm, turn=cos, sines=sin)
    batch, tokens, width = x.shape
    rows, heads = batch * tokens, len(weight) // head_dim
    out = torch.empty((batch, heads, tokens, head_dim), device=x.device, dtype=x.dtype)
    if not out.numel():
        return out
    tile = min(MOST_TILE, max(16, triton.next_power_of_2(rows)))
    pairs = PAIRS if norm is None else max(8, triton.next_power_of_2(head_dim // 2))
    depth = STAGE // ((tile + 2 * pairs) * x.element_size())
    depth = 1 << min(7, max(4, depth.bit_length() - 1))
    parts = triton.cdiv(head_dim // 2, pairs)
    turned = (0, 0) if cos is None else _strides(cos, batch)
    with torch.cuda.device_of(x):
        _query_kernel[(heads * parts, triton.cdiv(rows, tile))](
            x, weight, bias, norm, cos, sin, out, rows, tokens, width, heads, eps,
            *x.stride()[:2], weight.stride(0), *turned,
            *(turned if sin is None else _strides(sin, batch)),
            D=head_dim, HALF=0 if cos is None else cos.shape[-1] // 2, PARTS=parts,
            BLOCK_M=tile, BLOCK_P=pairs, BLOCK_K=depth, num_warps=4, num_stages=4,
        )  # fmt: skip
    return out


def _strides(x: Tensor, batch: int) -> tuple[int, int]:
    """By sample and by token of [B or 1, 1, T, R]."""
    x = x.expand(batch, -1, -1, -1)
    return x.stride(0), x.stride(2)


def _refuse(head_dim: int, **given: Tensor | None) -> None:
    """Refuse what torch can take and the kernel cannot."""
    x = given["x"]
    if head_dim % 2 or head_dim > MOST_DIM:
        raise ValueError(f"head_dim: must be even and up to {MOST_DIM}, found {head_dim}")
    for name, tensor in given.items():
        if tensor is None or x is None:
            continue
        allowed = (x.dtype,) if name == "weight" else DTYPES
        if tensor.dtype not in allowed:
            wanted = " or ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"{name}: must be {wanted}, found {tensor.dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            found = tensor.stride()
            raise ValueError(f"{name}: numbers of a row must be neighbours, found {found}")


@triton.jit(do_not_specialize=["rows", "tokens"])
def _query_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, cos_ptr, sin_ptr, out_ptr,
    rows, tokens, width, heads, eps,
    x_sample, x_token, weight_row, cos_sample, cos_token, sin_sample, sin_token,
    D: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = m < rows
    sample, token = (m // tokens).to(tl.int64), (m % tokens).to(tl.int64)
    # Column n of the product is number n % 2 of pair n // 2; what is not rotated is in pairs too.
    n = tl.arange(0, 2 * BLOCK_P)
    pair = part * BLOCK_P + n // 2
    number = tl.where(pair < HALF, pair + n % 2 * HALF, pair + HALF + n % 2 * (D // 2 - HALF))
    number = number.to(tl.int64) + head * D
    there = pair < D // 2
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (sample * x_sample + token * x_token)[:, None] + k[None, :]
    weight_at = weight_ptr + (number * weight_row)[:, None] + k[None, :]
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_P], tl.float32)
    for start in range(0, width, BLOCK_K):
        inside = (start + k < width)[None, :]
        x = tl.load(x_at + start, mask=live[:, None] & inside, other=0.0)
        weight = tl.load(weight_at + start, mask=there[:, None] & inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + number, mask=there, other=0.0).to(tl.float32)[None, :]
    if norm_ptr is not None:
        acc *= tl.rsqrt(tl.sum(acc * acc, 1) / D + eps)[:, None]
        acc *= tl.load(norm_ptr + number - head * D, mask=there, other=0.0).to(tl.float32)[None, :]
    first, second = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_P, 2)))
    pair = part * BLOCK_P + tl.arange(0, BLOCK_P)
    if cos_ptr is not None:
        turned = live[:, None] & (pair < HALF)[None, :]
        cos_at = cos_ptr + (sample * cos_sample + token * cos_token)[:, None] + pair[None, :]
        sin_at = sin_ptr + (sample * sin_sample + token * sin_token)[:, None] + pair[None, :]
        cos = tl.load(cos_at, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_at, mask=turned, other=0.0).to(tl.float32)
        low = first * cos + second * sin
        cos = tl.load(cos_at + HALF, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_at + HALF, mask=turned, other=0.0).to(tl.float32)
        first, second = low, second * cos + first * sin
    number = tl.where(pair < HALF, pair, pair + HALF)
    out_at = out_ptr + (((sample * heads + head) * tokens + token) * D)[:, None] + number[None, :]
    known = live[:, None] & (pair < D // 2)[None, :]
    apart = tl.where(pair < HALF, HALF, D // 2 - HALF)[None, :]
    tl.store(out_at, first.to(out_ptr.dtype.element_ty), mask=known)
    tl.store(out_at + apart, second.to(out_ptr.dtype.element_ty), mask=known)
