"""How a cache's rows lie: in 8, 4 or 2 bits, in a pool of rows, not yet rotated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.kernels.few_bits import FewBits
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
        few: rows lie in few bits, but for the recent ones: keys and values are then these alone,
            [B, H_kv, L, D], and may differ in number. Neither scales nor table beside it.
    """

    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    table: Tensor | None = None
    lengths: Tensor | None = None
    turn: Turn | None = None
    few: FewBits | None = None

    def rows(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return copies [B, H_kv, S, D] of keys and values as `attend` takes them without this."""
        scales = [self.k_scale, self.v_scale]
        if self.table is not None:
            k, v = _gathered(k, self.table), _gathered(v, self.table)
            scales = [scale if scale is None else _gathered(scale, self.table) for scale in scales]
        if self.few is not None:
            k, v = self.few.rows(k, v)
        k, v = (_decoded(x, scale, dtype) for x, scale in zip((k, v), scales, strict=True))
        return (k if self.turn is None else _turned(k, self.turn)), v

    def held(self, rows: int) -> Tensor | None:
        """Which of so many rows hold something by `lengths`, [B, H_kv or 1, S]; None: all may."""
        if self.lengths is None:
            return None
        lengths = self.lengths if self.lengths.dim() == 2 else self.lengths.unsqueeze(1)
        return torch.arange(rows, device=lengths.device) < lengths.unsqueeze(-1)


def _gathered(pool: Tensor, table: Tensor) -> Tensor:
    """Rows [B, H_kv, S, ...] of a pool [rows, H_kv, ...]."""
    if table.dim() == 2:
        return pool[table].transpose(1, 2)
    return pool[table, torch.arange(pool.shape[1], device=pool.device)[:, None]]


def _decoded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.dtype in (torch.uint8, FLOAT8):
        wide = from_float8(x.view(torch.uint8), dtype)
    else:
        wide = x.to(dtype)
    if scale is None:
        return wide
    return wide * scale if wide is x else wide.mul_(scale)


def _turned(k: Tensor, turn: Turn) -> Tensor:
    at = turn.positions.clamp_min(0)
    at = at.unsqueeze(1) if at.dim() == 2 else at
    cos, sin = turn.cos[at].to(k.dtype), turn.sin[at].to(k.dtype)
    half = cos.shape[-1]
    low, high, rest = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
