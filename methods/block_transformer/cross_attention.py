"""A decoder whose layers also read a few vectors by cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.methods.cache.ephemeral import EphemeralCache
from kvlab.methods.cache.interface import Cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.layers import norm
from kvlab.methods.decoder.model import Decoder


class Memory(nn.Module):
    """The keys and values that one layer's cross-attention reads.

    Apart from `CrossAttention`, because they are computed once a block and that runs every step;
    sharded training gathers the weights of a module around its `forward`.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        rows = 2 * config.kv_heads * config.head_dim
        self.kv = nn.Linear(config.width, rows, bias=config.qkv_bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors [M, n, W] to one tensor [M, 2 H_kv, n, D], keys first."""
        rows = torch.as_tensor(self.kv(vectors))
        return torch.unflatten(rows, -1, (-1, self.head_dim)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention to a memory without masks or positions: each memory vector has its own weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = norm(config)
        inner = config.heads * config.head_dim
        self.q = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.width, bias=config.out_bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Add to the residual stream x [M, T, W] what its rows read in memory."""
        q = torch.unflatten(self.q(self.norm(x)), -1, (-1, self.head_dim)).transpose(1, 2)
        k, v = memory.chunk(2, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return torch.as_tensor(x + self.out(mixed.transpose(1, 2).flatten(2)))


class CrossAttendingDecoder(Decoder):
    """The one decoder with a cross-attention in front of every layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.cross = nn.ModuleList(CrossAttention(config) for _ in range(config.layers))
        self.memories = nn.ModuleList(Memory(config) for _ in range(config.layers))
        self.cross.apply(self._initialise)
        self.memories.apply(self._initialise)

    def memory(self, vectors: Tensor) -> list[Tensor]:
        """Return each layer's keys and values of vectors [M, n, W]."""
        return [memory(vectors) for memory in self.memories]

    def body_over(
        self,
        hidden: Tensor,
        memory: list[Tensor],
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the layers and the final norm as `body` does, over `memory` (see there)."""
        cache = EphemeralCache(self.config) if cache is None else cache
        step = self._pass(hidden, positions, cache)
        for layer, cross, known in zip(self.layers, self.cross, memory, strict=True):
            hidden = layer(cross(hidden, known), step)
        cache.finish()
        return torch.as_tensor(self.norm(hidden))

    def body_parameters(self) -> int:
        own = (self.cross, self.memories)
        return super().body_parameters() + sum(p.numel() for m in own for p in m.parameters())
