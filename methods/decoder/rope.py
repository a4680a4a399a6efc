"""Rotary position embedding: frequencies of every family, and the rotation itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvlab.methods.decoder.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> list[float]:
    """Radians per position of each rotated pair, `rotary_dim / 2` of them."""
    dim = config.rotary_dim
    plain = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain]
    return [_llama3(f, scaling) for f in plain]


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_positions / scaling.low_frequency_factor
    shortest = scaling.original_positions / scaling.high_frequency_factor
    if wavelength < shortest:
        return frequency
    if wavelength > longest:
        return frequency / scaling.factor
    kept = (scaling.original_positions / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def signed_frequencies(config: DecoderConfig) -> Tensor:
    """[-f, f] in float32, `rotary_dim` of them.

    The sine is odd, so the first half of each pair gets the minus sign that its rotation needs.
    """
    f = torch.tensor(frequencies(config), dtype=torch.float32)
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
        self.dim = frequencies.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, T, D]; dimensions past `rotary_dim` pass through."""
        if self.dim == x.shape[-1]:
            return torch.addcmul(x * self.cos, x.roll(self.dim // 2, -1), self.sin)
        turned, kept = x[..., : self.dim], x[..., self.dim :]
        turned = torch.addcmul(turned * self.cos, turned.roll(self.dim // 2, -1), self.sin)
        return torch.cat((turned, kept), -1)
