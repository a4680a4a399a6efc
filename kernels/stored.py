"""Attention over a cache's rows as they lie: in 8 bits, in a pool of rows, not yet rotated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.kernels.attention import CAUSAL, EMPTY, Rule, attend
from kvlab.kernels.choice import fused
from kvlab.kernels.quantise import FLOAT8, from_float8


@dataclass(frozen=True, slots=True)
class Turn:
    """Where keys stand that are kept unrotated, and the rotation of every place.

    Pairs of dimensions are (i, i + R / 2); those from R on are left alone.

    Attributes:
        positions: [B, S] or [B, H_kv, S] integers below P; EMPTY on rows that hold nothing.
        cos, sin: [P, R / 2] float32, of the angle by which pair i is turned at a place.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """How rows lie in a cache, where that is not simply [B, H_kv, S, D].

    Attributes:
        k_scale, v_scale: [B, H_kv, S, 1], what codes are to be multiplied by; None: by nothing.
        table: [B, S] or [B, H_kv, S], the number of each row in a pool. Keys and values are then
            [rows, H_kv, D], their scales [rows, H_kv, 1]. Where a row holds nothing, any number.
        lengths: [B] or [B, H_kv]: rows from there on hold nothing.
        turn: keys are kept unrotated. Queries come rotated.
    """

    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    table: Tensor | None = None
    lengths: Tensor | None = None
    turn: Turn | None = None


def attend_stored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    stored: Stored,
    rule: Rule = CAUSAL,
    mass_rows: slice | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`attend` over rows as they are stored: no row is rewritten, and on CUDA none is copied.

    Args:
        q: [B, H, T, D].
        k, v: [B, H_kv, S, D] and [B, H_kv, S, D_v], or rows of a pool (`Stored.table`), in the
            dtype of q, as int8 codes or as 8-bit floats (float8_e4m3fn or its bytes; none is NaN).
        q_positions, k_positions, rule, mass_rows: as in `attend`.

    Returns:
        As `attend`: out [B, H, T, D_v] in the dtype of q, and the key mass [B, H, S] or None.

    Raises:
        ValueError: on CUDA, an argument does not fit the others.
    """
    if fused(q):
        from kvlab.kernels.gpu.attention import attend as attend_fused

        return attend_fused(q, k, v, q_positions, k_positions, rule, mass_rows, stored)
    if stored.table is not None:
        k, v = _gathered(k, stored.table), _gathered(v, stored.table)
    scales = [stored.k_scale, stored.v_scale]
    if stored.table is not None:
        scales = [scale if scale is None else _gathered(scale, stored.table) for scale in scales]
    k, v = (_decoded(x, scale, q.dtype) for x, scale in zip((k, v), scales, strict=True))
    if stored.turn is not None:
        k = _turned(k, stored.turn)
    if stored.lengths is None:
        return attend(q, k, v, q_positions, k_positions, rule, mass_rows)
    places = torch.arange(k.shape[2], device=k.device)
    lengths = stored.lengths if stored.lengths.dim() == 2 else stored.lengths.unsqueeze(1)
    held = places < lengths.unsqueeze(-1)
    if k_positions is None and q_positions is not None:
        mask = held.unsqueeze(2).expand(-1, -1, q.shape[2], -1)
        return attend(q, k, v, q_positions, None, rule, mass_rows, mask)
    k_positions = places.expand(len(k), 1, -1) if k_positions is None else k_positions
    k_positions = k_positions.unsqueeze(1) if k_positions.dim() == 2 else k_positions
    k_positions = k_positions.expand(len(k), k.shape[1], -1).masked_fill(~held, EMPTY)
    return attend(q, k, v, q_positions, k_positions, rule, mass_rows)


def _gathered(pool: Tensor, table: Tensor) -> Tensor:
    """Rows [B, H_kv, S, ...] of a pool [rows, H_kv, ...]."""
    if table.dim() == 2:
        return pool[table].transpose(1, 2)
    return pool[table, torch.arange(pool.shape[1], device=pool.device)[:, None]]


def _decoded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.dtype in (torch.uint8, FLOAT8):
        x = from_float8(x.view(torch.uint8), dtype)
    return x.to(dtype) if scale is None else x.to(dtype) * scale


def _turned(k: Tensor, turn: Turn) -> Tensor:
    at = turn.positions.clamp_min(0)
    at = at.unsqueeze(1) if at.dim() == 2 else at
    cos, sin = turn.cos[at].to(k.dtype), turn.sin[at].to(k.dtype)
    half = cos.shape[-1]
    low, high, rest = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
