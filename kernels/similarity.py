"""Cosine of two residual streams, a few rows at a time: neither is ever copied as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.choice import fused

EPS = 1e-8
"""The least norm a row is divided by, as in torch's cosine_similarity."""
ALONE = (1 << 15) - 1
"""Most elements that torch works on in one thread: no other is waited for, on a busy CPU the most
of the time that so little work takes."""
FEW_THREADS = 8
"""Up to so many, one thread is a small part of what the rest of a layer takes them."""
EACH = 1 << 16
"""Elements of each of many threads at a time: what stays in a core's cache."""
ON_GPU = 1 << 24
"""Products that are held at a time elsewhere: 64 MiB."""


class Added(NamedTuple):
    """after: [B, T, W], the sum. cosine: [B, T] float32. mean: [B] float32, over the rows."""

    after: Tensor
    cosine: Tensor
    mean: Tensor


@torch.no_grad()
def residual_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine along the last dimension [B, T], float32; no gradient, no host sync.

    torch's cosine_similarity (eps 1e-8) in float32, without its unit vectors: the products are
    summed a few rows at a time, so the memory used does not grow with the text.

    Args:
        before, after: [B, T, W] of one dtype, the stream around a layer's attention.
    """
    if fused(before):
        from kvlab.kernels.gpu import cosine as gpu

        return gpu.residual_cosine(before, after)
    width = before.shape[-1]
    left, right = before.reshape(-1, width), after.reshape(-1, width)
    cosine = torch.empty(len(left), device=before.device, dtype=torch.float32)
    rows = max(1, _at_once(before) // width)
    held = cosine.new_empty(min(rows, len(left)), width)
    for start in range(0, len(left), rows):
        part = slice(start, start + rows)
        one, other, out = left[part], right[part], cosine[part]
        products = held[: len(out)]
        torch.mul(one.float(), other, out=products)
        torch.sum(products, -1, out=out)
        out.div_(_norm(one)).div_(_norm(other))
    return cosine.view(before.shape[:-1])


@torch.no_grad()
def add_with_cosine(before: Tensor, delta: Tensor, valid: Tensor | None = None) -> Added:
    """Return `before + delta`, its cosine with `before`, and each sample's mean cosine.

    No gradient, no host sync. The mean of a sample without a row that counts is 0.

    Args:
        before: [B, T, W], the residual stream. delta: [B, T, W], what a layer's attention adds.
        valid: [B, T] bool, rows that count in the mean; None: all.

    Raises:
        ValueError: shapes, devices or dtypes that do not go together.
    """
    if fused(before):
        from kvlab.kernels.gpu import cosine as gpu

        return gpu.add_with_cosine(before, delta, valid)
    refuse_streams("delta", before, delta)
    refuse_valid(before, valid)
    after = before + delta
    cosine = residual_cosine(before, after)
    counted = torch.ones_like(cosine) if valid is None else valid.float()
    return Added(after, cosine, (cosine * counted).sum(1) / counted.sum(1).clamp_min(1))


def refuse_streams(name: str, before: Tensor, other: Tensor) -> None:
    """Refuse residual streams [B, T, W] that do not go together; `name` is the other one's."""
    if before.dim() != 3 or not before.is_floating_point():
        found = f"{list(before.shape)} {before.dtype}"
        raise ValueError(f"before: must be floating-point numbers [B, T, W], found {found}")
    if other.shape != before.shape or not other.is_floating_point():
        found = f"{list(other.shape)} {other.dtype}"
        wanted = f"floating-point numbers {list(before.shape)}, as before is"
        raise ValueError(f"{name}: must be {wanted}, found {found}")
    if other.device != before.device:
        raise ValueError(
            f"{name}: must lie on {before.device}, as before does, found {other.device}"
        )


def refuse_valid(before: Tensor, valid: Tensor | None) -> None:
    """Refuse marks that are not [B, T] bool beside a stream [B, T, W]."""
    if valid is None:
        return
    if valid.shape != before.shape[:2] or valid.dtype != torch.bool:
        found = f"{list(valid.shape)} {valid.dtype}"
        raise ValueError(f"valid: must be bool {list(before.shape[:2])}, found {found}")
    if valid.device != before.device:
        raise ValueError(
            f"valid: must lie on {before.device}, as before does, found {valid.device}"
        )


def _at_once(x: Tensor) -> int:
    """Elements of a stream to work on at a time."""
    if x.device.type != "cpu":
        return ON_GPU
    threads = torch.get_num_threads()
    return ALONE if threads <= FEW_THREADS else threads * EACH


def _norm(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norm.clamp_min_(EPS)
