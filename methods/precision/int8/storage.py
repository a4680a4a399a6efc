"""int8 as a storage."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.quantise import quantise_symmetric
from kvlab.methods.cache.storage import Space
from kvlab.methods.precision.by_row import RowStorage


class Int8(RowStorage):
    """8-bit integers and a scale for each row and head."""

    error = 1 / 253  # half of 1 / 127, and what float32 rounds

    def empty(self, space: Space) -> dict[str, Tensor]:
        return {
            "codes": space.zeros(space.rows, space.head_dim, dtype=torch.int8),
            "scale": space.zeros(space.rows, 1, dtype=space.dtype),
        }

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        codes, scale = quantise_symmetric(x)
        return {"codes": codes, "scale": scale}
