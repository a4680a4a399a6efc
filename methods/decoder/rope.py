"""Rotary position embedding: frequencies of every family, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kvlab.kernels.choice import fused
from kvlab.kernels.query import rotate
from kvlab.kernels.stored import Stored, Turn
from kvlab.methods.cache.interface import Keys
from kvlab.methods.decoder.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position of each rotated pair, [rotary_dim / 2].

    In float32 and in this order of operations, as checkpoints were trained: at position 100,000 the
    last bit of a frequency is a hundredth of a radian.
    """
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / config.rope_theta ** (steps / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return _llama3(plain, scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: divide long wavelengths by the factor, keep short ones, a ramp in between."""
    turns = scaling.original_positions * plain / (2 * math.pi)  # over the length first trained on
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def signed_frequencies(config: DecoderConfig) -> Tensor:
    """[-f, f] in float32, `rotary_dim` of them.

    The sine is odd, so the first half of each pair gets the minus sign that its rotation needs.
    """
    f = frequencies(config)
    return torch.cat((-f, f))


class Rotation:
    """The cosines and sines of one set of positions, shared by all layers of a pass.

    Pairs are (i, i + rotary_dim / 2), the layout of Hugging Face checkpoints.
    """

    def __init__(self, frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        """Args: frequencies: `signed_frequencies`; positions: [B, T] or [B, H, T] integers."""
        angles = positions.unsqueeze(-1) * frequencies
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)  # [B, 1, T, R]: the same for all heads
        self.cos = angles.cos().to(dtype)
        self.sin = angles.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, T, D]; dimensions past `rotary_dim` pass through."""
        return rotate(x, self.cos, self.sin)


class Rotations:
    """Rotations to positions that a cache gives, each worked out once for all layers of a pass."""

    def __init__(self, frequencies: Tensor) -> None:
        """Args: frequencies: `signed_frequencies`."""
        self._frequencies = frequencies
        # Positions are kept beside their rotation, so that their id stays theirs.
        self._known: dict[int, tuple[Tensor, Rotation]] = {}
        self._by_place: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, H, T, D] to positions [B, T] or [B, H, T]."""
        known = self._known.get(id(positions))
        if known is None:
            rotation = Rotation(self._frequencies, positions, x.dtype)
            known = self._known[id(positions)] = positions, rotation
        return known[1](x)

    def keys(self, keys: Keys, positions: Tensor, q: Tensor) -> Keys:
        """Rotate keys that are kept unrotated: a copy of them, or for few queries as they are read.

        Args:
            positions: [B, S] or [B, H_kv, S], each less than S.
            q: [B, H, T, D], what will read them.
        """
        if fused(keys.k) and q.shape[2] < positions.shape[-1]:
            turn = Turn(positions, *self._places(positions.shape[-1]))
            return keys._replace(stored=replace(keys.stored or Stored(), turn=turn))
        k, v = keys.rows(q.dtype)
        return Keys(self(k, positions), v, keys.positions)

    def _places(self, count: int) -> tuple[Tensor, Tensor]:
        """The cosine and sine [count, rotary_dim / 2] of every pair at places 0, 1, ..."""
        if count not in self._by_place:
            pairs = self._frequencies[len(self._frequencies) // 2 :]
            angles = torch.arange(count, device=pairs.device).unsqueeze(1) * pairs
            self._by_place[count] = angles.cos(), angles.sin()
        return self._by_place[count]
