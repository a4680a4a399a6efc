"""What int8 and fp8 have in common: a row is encoded by itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from kvlab.kernels.stored import Stored
from kvlab.methods.cache.storage import Space, Storage, put_rows


class RowStorage(Storage):
    """Rows in the parts that a row is encoded to, the same for keys and for values.

    Subclasses say what the parts are.
    """

    def __init__(self, params: Any, space: Space) -> None:
        self.params, self.dtype = params, space.dtype
        self.k, self.v = self.empty(space), self.empty(space)

    @abstractmethod
    def empty(self, space: Space) -> dict[str, Tensor]:
        """Return the parts [B, H_kv, C, ...] of empty rows: `codes`, maybe `scale`."""

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Return the parts [B, H_kv, n, ...] of rows [B, H_kv, n, D]."""

    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        for kept, rows in ((self.k, k), (self.v, v)):
            for name, part in self.encode(rows).items():
                put_rows(kept[name], slots, part)

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        k, v, stored = self.lying(rows)
        return stored.rows(k, v, self.dtype)

    def lying(self, rows: int) -> tuple[Tensor, Tensor, Stored]:
        k, v = (
            {name: part[:, :, :rows] for name, part in kept.items()} for kept in (self.k, self.v)
        )
        return k["codes"], v["codes"], Stored(k.get("scale"), v.get("scale"))

    def state(self) -> dict[str, Tensor]:
        parts = (("k", self.k), ("v", self.v))
        return {f"{of}.{name}": part for of, kept in parts for name, part in kept.items()}

    def nbytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in self.state().values())
