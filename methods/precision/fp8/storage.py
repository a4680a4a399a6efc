"""fp8 as a storage."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.quantise import quantise_float8, to_float8
from kvlab.methods.cache.storage import Space
from kvlab.methods.precision.by_row import RowStorage
from kvlab.methods.precision.fp8.params import Fp8Params


class Fp8(RowStorage):
    """8-bit floats, kept as bytes: torch can index those on every device."""

    params: Fp8Params
    error = 1 / 16  # three bits behind the point

    def empty(self, space: Space) -> dict[str, Tensor]:
        found = {"codes": space.zeros(space.rows, space.head_dim, dtype=torch.uint8)}
        if self.params.scale == "row":
            found["scale"] = space.zeros(space.rows, 1, dtype=space.dtype)
        return found

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        if self.params.scale == "none":
            return {"codes": to_float8(x).view(torch.uint8)}
        codes, scale = quantise_float8(x)
        return {"codes": codes.view(torch.uint8), "scale": scale}
