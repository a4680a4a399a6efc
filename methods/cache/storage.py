"""Where the keys and values of one KV layer lie: a value of the precision axis is a `Storage`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.stored import Stored


class Space(NamedTuple):
    """What a storage is made for: [batch, heads, rows, head_dim] keys, and as many values."""

    batch: int
    heads: int
    rows: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return zeros [batch, heads, *shape] on the device."""
        return torch.zeros((self.batch, self.heads, *shape), dtype=dtype, device=self.device)


class Storage(ABC):
    """Rows of keys and values in numbered slots.

    A precision value names one as its implementation; it is made as `cls(params, space)`.

    Attributes:
        by_row: a row's stored form depends on that row alone. If not (KIVI's groups of rows), the
            storage counts the rows of each sample, and takes them by `fill` and by slots of [B, 1].
        error: how far a number may be from the one that was put, as a share of the largest
            magnitude among all; scales in float32. 0: it is the same.
    """

    by_row: bool = True
    error: float = 0.0

    @abstractmethod
    def __init__(self, params: Any, space: Space) -> None: ...

    @abstractmethod
    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrite slots with rows [B, H_kv, n, D] in the model's dtype.

        Args:
            slots: a slice or [n], the same of every sample and head; or [B, 1 or H_kv, n]. Where
                these are several, a negative one says that the row is not stored.
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

    def lying(self, rows: int) -> tuple[Tensor, Tensor, Stored | None]:
        """Return what `get` does without a copy, and how it lies, as `attend` takes them."""
        return *self.get(rows), None

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The live tensors by name: saving reads them, restoring copies into them."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the live storages (`untyped_storage().nbytes()`), scales included."""


class PlainStorage(Storage):
    """Rows as the model made them; `get` copies nothing."""

    def __init__(self, params: Any, space: Space) -> None:
        self.k, self.v = (
            space.zeros(space.rows, space.head_dim, dtype=space.dtype) for _ in range(2)
        )

    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        put_rows(self.k, slots, k)
        put_rows(self.v, slots, v)

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.k[:, :, :rows], self.v[:, :, :rows]

    def state(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def nbytes(self) -> int:
        return self.k.untyped_storage().nbytes() + self.v.untyped_storage().nbytes()


def put_rows(kept: Tensor, slots: slice | Tensor, rows: Tensor) -> None:
    """Overwrite slots of `kept` [B, H_kv, C, D] with rows [B, H_kv, n, D] of its dtype.

    Waits for the device where rows of several slots [B, 1 or H_kv, n] may be left out.

    Args:
        slots: as in `Storage.put`.
    """
    if isinstance(slots, slice) or slots.dim() == 1:
        kept[:, :, slots] = rows
    elif rows.shape[2] == 1:
        kept.scatter_(2, slots.unsqueeze(-1).expand(rows.shape), rows)
    else:
        slots = slots.expand(rows.shape[:3])
        sample, head, row = (slots >= 0).nonzero(as_tuple=True)
        kept[sample, head, slots[sample, head, row]] = rows[sample, head, row]
