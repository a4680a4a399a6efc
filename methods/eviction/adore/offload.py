"""Keys and values of every token in host memory: what ADORE's rebuild is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.opening import Opening


class Offloaded:
    """Rows of each KV layer by position.

    On CUDA the host waits for the places once a pass and for what each layer puts; what is fetched
    it sends without waiting.
    """

    def __init__(self, opening: Opening) -> None:
        c = opening.config
        shape = (2, opening.batch, c.kv_heads, opening.rows + 1, c.head_dim)
        self._rows, self._device = opening.rows, opening.device
        self._kept = {layer: torch.zeros(shape, dtype=opening.dtype) for layer in opening.readers()}
        self.begin()

    def begin(self) -> None:
        """Forget the last pass's places."""
        self._places: list[tuple[Tensor, Tensor]] = []

    def put(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Keep rows [B, H, T, D] that stand at positions [B, T], EMPTY on padding."""
        came = torch.stack((k, v)).to("cpu")
        self._kept[layer].scatter_(3, self._place(positions).expand(came.shape), came)

    def get(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Fetch rows [B, H, R, D] of positions [B, R]; those of EMPTY mean nothing."""
        kept, place = self._kept[layer], self._place(positions)
        shape = (*kept.shape[:3], place.shape[3], kept.shape[4])
        rows = kept.gather(3, place.expand(shape))
        if self._device.type == "cuda":
            rows = rows.pin_memory()
        k, v = rows.to(self._device, non_blocking=True)
        return k, v

    def tensors(self) -> dict[str, Tensor]:
        """What a saved cache keeps of it: the live tensors."""
        return {f"offloaded.{layer}": rows for layer, rows in self._kept.items()}

    def _place(self, positions: Tensor) -> Tensor:
        """The rows [1, B, 1, n, 1] of positions [B, n], which a pass gives as the same object."""
        for given, place in self._places:
            if given is positions:
                return place
        place = torch.where(positions == EMPTY, self._rows, positions).to("cpu")
        self._places.append((positions, place[None, :, None, :, None]))
        return self._places[-1][1]
