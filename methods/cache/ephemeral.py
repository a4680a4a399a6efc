"""The cache of a pass that has no past: training and scoring."""

from __future__ import annotations

from torch import Tensor

from kvlab.methods.cache.interface import Cache, Keys


class EphemeralCache(Cache):
    """Hands each layer the rows of this very pass, and forgets them at its end."""

    def __init__(self) -> None:
        self._rows: dict[int, Keys] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._rows[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys:
        return self._rows[layer]

    def finish(self) -> None:
        self._rows.clear()

    def nbytes(self) -> int:
        return 0
