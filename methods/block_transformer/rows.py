"""The two caches of the token decoder: of one parallel pass with padding, and of generation."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule
from kvlab.kernels.tokens import answers, attend_block
from kvlab.methods.cache.ephemeral import EphemeralCache
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.decoder.config import DecoderConfig


class MaskedPass(EphemeralCache):
    """A pass whose padding is masked as keys but still queries.

    The row of a pad predicts the first real token after it, so it must read the prefix; the
    position of a row stays its place in the block (fact 1.5).

    Args:
        config: of the token decoder.
        key_positions: [M, R], EMPTY on padding.
    """

    def __init__(self, config: DecoderConfig, key_positions: Tensor) -> None:
        super().__init__(config)
        self._key_positions = key_positions

    def read(self, layer: int) -> Keys | None:
        keys = super().read(layer)
        return None if keys is None else keys._replace(positions=self._key_positions)


class BlockRows(Cache):
    """The keys and values of the block that is being generated: storages reused for every block.

    Attributes:
        vectors: [B, n, D_t], what the block's context was expanded to.
        memory: per layer, keys and values of those vectors where layers read them by
            cross-attention; empty otherwise.

    Args:
        config: of the token decoder.
        batch: sequences.
        rows: most rows of one block.
        device, dtype: of the storages.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (2, batch, config.kv_heads, rows, config.head_dim)
        self._layers = [
            torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)
        ]
        self._held = 0
        self._arriving = 0
        self.vectors = torch.empty(0)
        self.memory: list[Tensor] = []

    def begin(self, vectors: Tensor, memory: list[Tensor]) -> None:
        """Forget the last block and begin one; the storages stay, those of the first block."""
        self._held = 0
        if not self.vectors.numel():
            self.vectors, self.memory = vectors.clone(), memory
            return
        for kept, fresh in zip((self.vectors, *self.memory), (vectors, *memory), strict=True):
            kept.copy_(fresh)

    def plan(self, step: Step) -> Extra | None:
        self.attends = step.rows == 1 and answers(self._layers[0])
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._arriving = k.shape[2]
        end = self._held + self._arriving
        self._layers[layer][0, :, :, self._held : end] = k
        self._layers[layer][1, :, :, self._held : end] = v

    def read(self, layer: int) -> Keys:
        k, v = self._layers[layer][:, :, :, : self._held + self._arriving]
        return Keys(k, v, None)

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        keys = self.read(layer)
        return attend_block(q, keys.k, keys.v)

    def finish(self) -> None:
        self._held += self._arriving

    def stored(self) -> Tensor:
        """The storages [B, layers, 2, H_kv, rows, D]; zero where nothing is held yet."""
        every = torch.stack(self._layers, dim=2).permute(1, 2, 0, 3, 4, 5).clone()
        every[..., self._held :, :] = 0
        return every

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (*self._layers, *self.memory))


class RequestRows(Cache):
    """The rows of blocks that are at different places, as a server's requests are.

    Attributes:
        kv: [B, layers, 2, H_kv, rows, D]; written in place.
        row: [B], where this step's row goes; those before it are held.
    """

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv
        self.row = torch.empty(0)
        self.attends = answers(kv)
        self._held = self.row + 1
        self._keys: Tensor | None = None

    def plan(self, step: Step) -> Extra | None:
        if self.attends:
            self._held = self.row + 1
            return None
        places = torch.arange(self.kv.shape[4], device=self.kv.device)
        self._keys = torch.where(places <= self.row.unsqueeze(1), places, EMPTY)
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        samples = torch.arange(len(k), device=k.device)
        self.kv[samples, layer, 0, :, self.row] = k[:, :, 0]
        self.kv[samples, layer, 1, :, self.row] = v[:, :, 0]

    def read(self, layer: int) -> Keys:
        return Keys(self.kv[:, layer, 0], self.kv[:, layer, 1], self._keys)

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        return attend_block(q, self.kv[:, layer, 0], self.kv[:, layer, 1], self._held)

    def nbytes(self) -> int:
        return self.kv.untyped_storage().nbytes()
