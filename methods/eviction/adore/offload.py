"""Keys and values of every token in host memory: what ADORE's rebuild is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.opening import Opening


class Offloaded:
    """Rows of each KV layer by position. On CUDA every fetch waits for the host."""

    def __init__(self, opening: Opening) -> None:
        c = opening.config
        shape = (opening.batch, c.kv_heads, opening.rows + 1, c.head_dim)
        self._rows, self._device = opening.rows, opening.device
        pinned = opening.device.type == "cuda"
        self._kept = {
            layer: tuple(
                torch.zeros(shape, dtype=opening.dtype, pin_memory=pinned) for _ in range(2)
            )
            for layer in opening.readers()
        }

    def put(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Keep rows [B, H, T, D] that stand at positions [B, T], EMPTY on padding."""
        place = self._place(positions)
        for kept, came in zip(self._kept[layer], (k, v), strict=True):
            index = place[:, None, :, None].expand(-1, came.shape[1], -1, came.shape[3])
            kept.scatter_(2, index, came.to("cpu"))

    def get(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch rows [B, H, R, D] of positions [B, R]; those of EMPTY mean nothing."""
        place = self._place(positions)
        k, v = (
            kept.gather(2, place[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])).to(
                self._device, non_blocking=True
            )
            for kept in self._kept[layer]
        )
        return k, v

    def tensors(self) -> dict[str, Tensor]:
        """What a saved cache keeps of it: the live tensors."""
        return {
            f"offloaded.{layer}.{name}": tensor
            for layer, rows in self._kept.items()
            for name, tensor in zip("kv", rows, strict=True)
        }

    def _place(self, positions: Tensor) -> Tensor:
        return torch.where(positions == EMPTY, self._rows, positions).to("cpu")
