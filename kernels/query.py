"""The queries of a layer: projected, normed by head and rotated. Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.choice import fused
from kvlab.kernels.norm import rms_norm
from kvlab.kernels.precision import working_dtype

MOST_ROWS = 64
"""Rows of a batch up to which a kernel answers: more are the work of torch's matrix product."""
MOST_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Turn = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, 1, T, R], R even: see `rotate`."""


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
    """Return the queries [B, H, T, D] of hidden rows, in the dtype of the map.

    Args:
        x: [B, T, W].
        weight: [H D, W], rows by head; D is `head_dim`. bias: [H D].
        norm: [D], weight of an RMS norm of each head with `eps`; None: they are not normed.
        turn: what the first R numbers of each head are rotated by; None: they are not.

    Raises:
        ValueError: shapes or devices that do not go together.
    """
    refuse(x, weight, head_dim, bias, norm, turn)
    if _fusible(x, weight, head_dim, bias, norm, turn):
        from kvlab.kernels.gpu import query as gpu

        return gpu.project(x, weight, head_dim, bias=bias, norm=norm, eps=eps, turn=turn)
    rows = F.linear(x, weight, bias)
    heads = rows.view(*rows.shape[:2], -1, head_dim).transpose(1, 2)
    heads = heads if norm is None else rms_norm(heads, norm, eps)
    return heads if turn is None else rotate(heads, *turn)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R / 2) of x [B, H, T, D]; dimensions from R on pass through.

    Args:
        cos, sin: [B or 1, H or 1, T, R]; the sines of a pair's first half come with a minus sign.
    """
    size = cos.shape[-1]
    turned = x if size == x.shape[-1] else x[..., :size]
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)


def refuse(
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    bias: Tensor | None,
    norm: Tensor | None,
    turn: Turn | None,
) -> None:
    """Refuse what `project` cannot take."""
    if x.dim() != 3:
        raise ValueError(f"x: must be [B, T, W], found {list(x.shape)}")
    batch, tokens, width = x.shape
    if weight.dim() != 2 or weight.shape[1] != width or head_dim < 1 or len(weight) % head_dim:
        wanted = f"[a multiple of {head_dim}, {width}]"
        raise ValueError(f"weight: must be {wanted}, found {list(weight.shape)}")
    fits: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, weight.shape),
        "bias": (bias, weight.shape[:1]),
        "norm": (norm, (head_dim,)),
    }
    if turn is not None:
        cos = turn[0]
        size = cos.shape[-1] if cos.dim() else 0
        if cos.shape not in ((batch, 1, tokens, size), (1, 1, tokens, size)):
            found = list(cos.shape)
            raise ValueError(f"turn: must be [{batch} or 1, 1, {tokens}, R], found {found}")
        if size % 2 or size > head_dim:
            raise ValueError(f"turn: must be of up to {head_dim} numbers, in pairs, found {size}")
        fits |= {"turn": (cos, cos.shape), "turn's sines": (turn[1], cos.shape)}
    for name, (tensor, shape) in fits.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: must be {list(shape)}, found {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: must lie on {x.device}, as x, found {tensor.device}")


def _fusible(
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    bias: Tensor | None,
    norm: Tensor | None,
    turn: Turn | None,
) -> bool:
    """Whether our kernel can answer: few rows, without gradients, in the dtype as it is."""
    if not fused(x) or x.shape[0] * x.shape[1] > MOST_ROWS:
        return False
    given = [t for t in (x, weight, bias, norm, *(turn or ())) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    if head_dim % 2 or head_dim > MOST_DIM or any(t.stride(-1) != 1 for t in given):
        return False
    return x.dtype == weight.dtype == working_dtype(x) and all(t.dtype in DTYPES for t in given)
