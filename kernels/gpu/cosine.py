"""Cosine of two residual streams in one pass over them; also while the second is being made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.similarity import EPS, Added, refuse_streams, refuse_valid

TILE = 2048
"""Numbers of each stream that a program reads at a time."""


@torch.no_grad()
def residual_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Do as `kvlab.kernels.similarity.residual_cosine` does, in one launch."""
    refuse_streams("after", before, after)
    cosine = torch.empty(before.shape[:2], device=before.device, dtype=torch.float32)
    _launch(before, after, after, cosine, adds=False)
    return cosine


@torch.no_grad()
def add_with_cosine(before: Tensor, delta: Tensor, valid: Tensor | None = None) -> Added:
    """Do as `kvlab.kernels.similarity.add_with_cosine` does: a launch, and one of the means."""
    refuse_streams("delta", before, delta)
    refuse_valid(before, valid)
    dtype = torch.promote_types(before.dtype, delta.dtype)
    after = torch.empty(before.shape, device=before.device, dtype=dtype)
    cosine = torch.empty(before.shape[:2], device=before.device, dtype=torch.float32)
    _launch(before, delta, after, cosine, adds=True)
    batch, rows = cosine.shape
    mean = torch.empty((batch,), device=before.device, dtype=torch.float32)
    if batch:
        block = min(triton.next_power_of_2(max(rows, 1)), TILE)
        counted = cosine if valid is None else valid
        with torch.cuda.device_of(cosine):
            _mean_kernel[(batch,)](
                cosine, counted, mean, rows, *counted.stride(),
                COUNTS_ALL=valid is None, BLOCK=block,
            )  # fmt: skip
    return Added(after, cosine, mean)


def _launch(before: Tensor, other: Tensor, after: Tensor, cosine: Tensor, *, adds: bool) -> None:
    batch, rows, width = before.shape
    if not cosine.numel():
        return
    block = min(triton.next_power_of_2(max(width, 1)), TILE)
    at_once = TILE // block
    wide = after.dtype == torch.float64
    with torch.cuda.device_of(before):
        _cosine_kernel[(triton.cdiv(batch * rows, at_once),)](
            before, other, after, cosine, batch * rows, rows, width,
            *before.stride(), *other.stride(),
            EPS=EPS, ADDS=adds, SUM=tl.float64 if wide else tl.float32,
            ROWS=at_once, BLOCK=block, num_warps=4,
        )  # fmt: skip


@triton.jit
def _cosine_kernel(
    before_ptr, other_ptr, after_ptr, cosine_ptr, total, rows, width,
    before_sample, before_row, before_column, other_sample, other_row, other_column,
    EPS: tl.constexpr, ADDS: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    there = row < total
    before_ptr += row // rows * before_sample + row % rows * before_row
    other_ptr += row // rows * other_sample + row % rows * other_row
    after_ptr += row * width
    product = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    before_square = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    after_square = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
        mask = there & (column < width)
        x = tl.load(before_ptr + column * before_column, mask=mask, other=0.0)
        y = tl.load(other_ptr + column * other_column, mask=mask, other=0.0)
        if ADDS:
            y = (x.to(SUM) + y.to(SUM)).to(after_ptr.dtype.element_ty)
            tl.store(after_ptr + column, y, mask=mask)
        x, y = x.to(tl.float32), y.to(tl.float32)
        product += x * y
        before_square += x * x
        after_square += y * y
    before_norm = tl.maximum(tl.sqrt(tl.sum(before_square, 1)), EPS)
    after_norm = tl.maximum(tl.sqrt(tl.sum(after_square, 1)), EPS)
    cosine = tl.sum(product, 1) / before_norm / after_norm
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(cosine_ptr + row, cosine, mask=row < total)


@triton.jit
def _mean_kernel(
    cosine_ptr, valid_ptr, mean_ptr, rows, valid_sample, valid_row,
    COUNTS_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    count = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < rows
        if not COUNTS_ALL:
            valid_at = valid_ptr + sample * valid_sample + row.to(tl.int64) * valid_row
            valid = tl.load(valid_at, mask=mask, other=0)
            mask = mask & (valid != 0)
        total += tl.load(cosine_ptr + sample * rows + row, mask=mask, other=0.0)
        count += mask.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(mean_ptr + sample, mean)
