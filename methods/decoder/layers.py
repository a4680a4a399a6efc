"""The parts of a decoder layer: attention over a cache, the feed-forward layer, the residuals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.kernels.attention import Rule, attend
from kvlab.kernels.norm import rms_norm
from kvlab.kernels.precision import working_dtype
from kvlab.methods.cache.interface import Cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.rope import Rotation


class Pass:
    """What all layers of one forward pass share: positions, rotation, masks and the cache."""

    def __init__(
        self, positions: Tensor | None, frequencies: Tensor, like: Tensor, cache: Cache
    ) -> None:
        """Args: positions: [B, T] or None (packed). like: the residual stream [B, T, W]."""
        self.positions, self.frequencies, self.cache = positions, frequencies, cache
        if positions is None:
            self.places = torch.arange(like.shape[1], device=like.device).unsqueeze(0)
        else:
            self.places = positions
        self.rotation = Rotation(frequencies, self.places, working_dtype(like))
        self._masks: dict[tuple[int, Rule], tuple[Tensor, Tensor]] = {}

    def mask(self, rule: Rule, k_positions: Tensor | None) -> Tensor | None:
        """The mask of these keys, made once for all layers whose keys have the same positions.

        None where there is nothing to mask, or nothing but the future of packed rows.
        """
        keys = k_positions
        packed = keys is None and self.positions is None
        if packed and not rule.is_causal(self.places.shape[1]):
            keys = self.places
        if keys is None:
            return None
        known = self._masks.get((id(keys), rule))
        if known is None:
            # The positions are kept beside the mask so that their id stays theirs.
            known = self._masks[id(keys), rule] = keys, rule.allows(self.places, keys)
        return known[1]


class Attention(nn.Module):
    """Grouped-query attention that writes to and reads from a cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.width, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.rule = Rule(window=config.windows[layer] if config.windows else None)

    def forward(self, x: Tensor, step: Pass) -> tuple[Tensor, Tensor | None]:
        """Map normed hidden states [B, T, W] to the layer's attention output and its key mass."""
        batch, rows, _ = x.shape
        cache, layer = step.cache, self.layer
        qkv = self.qkv(x).view(batch, rows, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if not cache.rotates:
            q, k = step.rotation(q), step.rotation(k)
        cache.write(layer, k, v, step.positions)
        k, v, k_positions = cache.read(layer)
        if cache.rotates:
            for_queries, for_keys = cache.rotary_positions(layer, step.places)
            q = Rotation(step.frequencies, for_queries, q.dtype)(q)
            k = Rotation(step.frequencies, for_keys, k.dtype)(k)
        rule = cache.rule(layer, self.rule)
        out, key_mass = attend(
            q, k, v, step.positions, k_positions, rule,
            mass_rows=cache.key_mass_rows(layer), mask=step.mask(rule, k_positions),
        )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2)), key_mass


class FeedForward(nn.Module):
    """down(activation(up x)), or gated: down(activation(gate x) * up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        # Two maps rather than one fused: the backward pass need not join their gradients again.
        self.gate = (
            nn.Linear(config.width, config.ffn_width, bias=config.mlp_bias)
            if config.gated
            else None
        )
        self.up = nn.Linear(config.width, config.ffn_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map normed hidden states [B, T, W] to the layer's output."""
        inner = self._activate(self.up(x) if self.gate is None else self.gate(x))
        out: Tensor = self.down(inner if self.gate is None else inner * self.up(x))
        return out

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Layer(nn.Module):
    """One decoder layer: x + attention, then + feed-forward (of x itself when parallel)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.parallel = config.parallel
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        """Map the residual stream [B, T, W] to the next layer's."""
        attended, key_mass = self.attention(self.attention_norm(x), step)
        after = x + attended
        step.cache.observe(self.layer, x, after, key_mass)
        out: Tensor = after + self.mlp(self.mlp_norm(x if self.parallel else after))
        return out


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., width]."""
        return rms_norm(x, self.weight, self.eps)


def norm(config: DecoderConfig) -> nn.Module:
    """The family's normalisation over the residual stream."""
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps)
