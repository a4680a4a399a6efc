"""Cosine of two residual streams, row by row, read once and without a copy of either."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""The least norm a row is divided by, as in torch's cosine_similarity."""
AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Products held at a time: what stays in a core's cache; on CUDA, 64 MiB."""


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
    rows = max(1, AT_ONCE.get(before.device.type, 1 << 24) // width)
    held = cosine.new_empty(min(rows, len(left)), width)
    for start in range(0, len(left), rows):
        part = slice(start, start + rows)
        out = cosine[part]
        products = held[: len(out)]
        torch.mul(left[part].float(), right[part], out=products)
        torch.sum(products, -1, out=out)
    return cosine.div_(_norm(left)).div_(_norm(right)).view(before.shape[:-1])


def _norm(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norm.clamp_min_(EPS)
