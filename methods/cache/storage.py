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

    Attributes:
        by_row: a row's stored form depends on that row alone. If not (KIVI's groups of rows), the
            storage counts the rows of each sample, and takes them by `fill` and by slots of [B, 1].
    """

    by_row: bool = True

    @abstractmethod
    def __init__(self, params: Any, space: Space) -> None: ...

    @abstractmethod
    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite slots with rows [B, H_kv, n, D] in the model's dtype.

        Args:
            slots: a slice or [n], the same of every sample and head; or [B, 1 or H_kv, n].
        """

    def fill(self, k: Tensor, v: Tensor, counts: Tensor) -> None:
        """Put rows [B, H_kv, n, D] into the first n slots of an empty storage.

        Args:
            counts: [B] int64 on the CPU, how many of a sample's rows are real; the rest, which come
                last, may hold anything and will never be read.
        """
        self.put(slice(0, k.shape[2]), k, v)

    @abstractmethod
    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H_kv, rows, D] of the first slots, in the model's dtype."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The live tensors by name: saving reads them, restoring copies into them."""

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
        if isinstance(slots, Tensor) and slots.dim() == 3:
            places = slots.unsqueeze(-1).expand(*k.shape[:3], k.shape[-1])
            self.k.scatter_(2, places, k)
            self.v.scatter_(2, places, v)
            return
        self.k[:, :, slots] = k
        self.v[:, :, slots] = v

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.k[:, :, :rows], self.v[:, :, :rows]

    def state(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def nbytes(self) -> int:
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()
