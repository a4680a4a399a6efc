"""Where the keys and values of one KV layer lie: a value of the precision axis is a `Storage`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Space(NamedTuple):
    """What a storage is made for: [batch, heads, rows, head_dim] keys, and as many values."""

    batch: int
    heads: int
    rows: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype


class Storage(ABC):
    """Rows of keys and values in numbered slots.

    A precision value names one as its implementation; it is made as `cls(params, space)`.
    """

    @abstractmethod
    def __init__(self, params: Any, space: Space) -> None: ...

    @abstractmethod
    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite slots with rows [B, H_kv, n, D] in the model's dtype."""

    @abstractmethod
    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H_kv, rows, D] of the first slots, in the model's dtype."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the live storages (`untyped_storage().nbytes()`), scales included."""


class PlainStorage(Storage):
    """Rows as the model made them; `get` copies nothing."""

    def __init__(self, params: Any, space: Space) -> None:
        batch, heads, rows, head_dim, device, dtype = space
        self.k, self.v = (
            torch.empty((batch, heads, rows, head_dim), device=device, dtype=dtype)
            for _ in range(2)
        )

    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        self.k[:, :, slots] = k
        self.v[:, :, slots] = v

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.k[:, :, :rows], self.v[:, :, :rows]

    def nbytes(self) -> int:
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()
