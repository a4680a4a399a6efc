"""Attention of one query over the few rows of a block, for thousands of blocks. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, attend
from kvlab.kernels.choice import fused
from kvlab.kernels.precision import working_dtype

MOST_ROWS = 128
"""Rows of a block: more are the work of attention over a cache."""
MOST_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend_block(q: Tensor, k: Tensor, v: Tensor, held: Tensor | None = None) -> Tensor:
    """Attend to the first rows of each block; no mask is made.

    Args:
        q: [N, H, 1, D], already rotated. k: [N, H_kv, R, D]; H is a multiple of H_kv. v: [N, H_kv,
            R, D_v]. Of one dtype; numbers of a row are neighbours in memory.
        held: [N] integer, rows of each block that are held; the others may hold anything, and a
            block without any gives zero. None: all R are.

    Returns:
        [N, H, 1, D_v].

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not go together; more than 128 rows,
            or more than 256 numbers in one.
    """
    if fused(q):
        from kvlab.kernels.gpu import tokens as gpu

        return gpu.attend_block(q, k, v, held)
    refuse(q, k, v, held)
    if held is None:
        return attend(q, k, v, q.new_zeros(len(q), 1, dtype=torch.long), None)[0]
    rows = torch.arange(k.shape[2], device=q.device)
    there = rows < held.unsqueeze(1)
    places = torch.where(there, rows, EMPTY)
    v = v.masked_fill(~there[:, None, :, None], 0.0)
    k = k.masked_fill(~there[:, None, :, None], 0.0)
    return attend(q, k, v, (held - 1).unsqueeze(1), places)[0]


def answers(k: Tensor) -> bool:
    """Whether a kernel answers `attend_block` for keys [..., R, D] with values of their shape.

    Where none does, `attend` with positions needs no copy of them.
    """
    sizes = k.shape[-2] <= MOST_ROWS and k.shape[-1] <= MOST_DIM
    return fused(k) and sizes and k.dtype in DTYPES and k.dtype == working_dtype(k)


def refuse(q: Tensor, k: Tensor, v: Tensor, held: Tensor | None) -> None:
    """Refuse what `attend_block` cannot take."""
    if q.dim() != 4 or q.shape[2] != 1 or q.dtype not in DTYPES:
        found = f"{q.dtype} {list(q.shape)}"
        raise ValueError(f"q: must be [N, H, 1, D] in float32, bfloat16 or float16, found {found}")
    count, heads, _, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != count or x.dtype != q.dtype or x.device != q.device:
            wanted = f"{q.dtype} [{count}, H_kv, R, D] on {q.device}, as q"
            raise ValueError(
                f"{name}: must be {wanted}, found {x.dtype} {list(x.shape)} {x.device}"
            )
    if not k.shape[1] or heads % k.shape[1] or k.shape[3] != dim:
        wanted = f"a divisor of {heads} heads, and rows of {dim}"
        raise ValueError(f"k: must have {wanted}, found {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: must begin with {list(k.shape[:3])}, as k, found {list(v.shape)}")
    if not 0 < k.shape[2] <= MOST_ROWS:
        raise ValueError(f"k: must have 1 to {MOST_ROWS} rows, found {k.shape[2]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not 0 < x.shape[3] <= MOST_DIM or (x.stride(3) != 1 and x.shape[3] > 1):
            found = f"{x.shape[3]} with stride {x.stride(3)}"
            wanted = f"1 to {MOST_DIM} numbers, neighbours in memory"
            raise ValueError(f"{name}: rows must be {wanted}, found {found}")
    if held is None:
        return
    if held.shape != (count,) or held.dtype not in (torch.int32, torch.int64):
        found = f"{held.dtype} {list(held.shape)}"
        raise ValueError(f"held: must be integers [{count}], found {found}")
    if held.device != q.device:
        raise ValueError(f"held: must lie on {q.device}, as q, found {held.device}")
