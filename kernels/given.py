"""Checks of what kernels and their twins are given: shapes, dtypes and devices, never values."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_unlike(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    beside: Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    *,
    packed: bool = False,
) -> None:
    """Refuse a tensor of another shape, dtype or device than `beside`'s, or one with gaps.

    Args: packed: it must be contiguous. A tensor that is None is not refused.

    Raises:
        ValueError: one line that begins with the argument's name.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = f"{' or '.join(str(dtype) for dtype in dtypes)} {list(shape)}"
        raise ValueError(f"{name}: must be {wanted}, found {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != beside.device:
        raise ValueError(f"{name}: must lie on {beside.device}, found {tensor.device}")
    if packed and not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, found strides {tensor.stride()}")
