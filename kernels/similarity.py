"""Cosine of two residual streams, a few rows at a time: neither is ever copied as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

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


@torch.no_grad()
def residual_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine along the last dimension [B, T], float32; no gradient, no host sync.

    torch's cosine_similarity (eps 1e-8) in float32, without its unit vectors: the products are
    summed a few rows at a time, so the memory used does not grow with the text.

    Args:
        before, after: [B, T, W] of one dtype, the stream around a layer's attention.
    """
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
