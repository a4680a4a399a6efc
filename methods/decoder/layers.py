"""The parts of a decoder layer: attention over a cache, the feed-forward layer, the residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvlab.kernels.attention import Rule, attend
from kvlab.kernels.norm import rms_norm
from kvlab.kernels.precision import working_dtype
from kvlab.kernels.query import project
from kvlab.methods.cache.interface import Cache, Keys
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.rope import Rotation, Rotations

Onward = Literal["all", "last", "none"]
"""Which rows go on from a layer: all; the last alone; none: only their keys and values are kept."""


class Pass:
    """What all layers of one forward pass share: positions, rotation, masks and the cache.

    Attributes:
        positions: [B, T] of the rows, None where they are packed; places: the same, never None.
        final: no further pass over these layers follows.
    """

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
        self.rotations = Rotations(frequencies)
        self.final = True
        # Where keys stand that come without positions: those of packed rows.
        self._packed = self.places if positions is None else None
        self._masks: dict[tuple[int, Rule], tuple[Tensor, Tensor]] = {}

    def last_row(self, like: Tensor) -> Pass:
        """Return the same pass for its last row alone, which reads the keys of all of them."""
        last = Pass(self.places[:, -1:].expand(len(like), 1), self.frequencies, like, self.cache)
        last._packed = self._packed
        return last

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, H, T, D] to positions that a cache gave."""
        return self.rotation(x) if positions is self.places else self.rotations(x, positions)

    def standing(self, rule: Rule, k_positions: Tensor | None) -> Tensor | None:
        """Where keys stand, as `attend` takes it: the last of packed rows needs to know."""
        if k_positions is not None or self._packed is None or self.positions is None:
            return k_positions
        return None if rule.is_causal(self._packed.shape[1]) else self._packed

    def mask(self, rule: Rule, k_positions: Tensor | None) -> Tensor | None:
        """The mask of these keys, made once for all layers whose keys have the same positions.

        None where there is nothing to mask.
        """
        keys = self._packed if k_positions is None and self.positions is None else k_positions
        if keys is None:
            return None
        known = self._masks.get((id(keys), rule))
        if known is None:
            # The positions are kept beside the mask so that their id stays theirs.
            known = self._masks[id(keys), rule] = keys, rule.allows(self.places, keys)
        return known[1]


class Attention(nn.Module):
    """Grouped-query attention over the rows of a KV layer in a cache: its own, or another's.

    `qkv` maps to queries, keys and values; to queries alone where no layer reads this one.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.source = layer, config.kv_of[layer]
        self.owns_kv = layer in config.kv_layers
        self.heads, self.head_dim = config.heads, config.head_dim
        self.kv_heads = config.kv_heads if self.owns_kv else 0
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.width, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        owned = config.qk_norm and self.owns_kv
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if owned else None
        strict = config.sharing is not None and (config.sharing.strict or self.source > layer)
        self.rule = Rule(strict, config.windows[layer] if config.windows else None)

    def forward(self, x: Tensor, step: Pass) -> tuple[Tensor, Tensor | None]:
        """Map normed hidden states [B, T, W] to the layer's attention output and its key mass."""
        if self.owns_kv:
            counts = [self.heads, self.kv_heads, self.kv_heads]
            q, k, v = torch.split(self._heads(self.qkv(x)), counts, dim=1)
            step.cache.write(self.layer, self._turned(k, self.k_norm, step), v, step.positions)
            q = self._turned(q, self.q_norm, step)
        else:
            q = self.queries(x, step)
        if step.cache.attends:
            attended = step.cache.attend(self.layer, q, self.rule)
            return self.out(attended.transpose(1, 2).flatten(2)), None
        return self.read(q, step.cache.read(self.source), step)

    def queries(self, x: Tensor, step: Pass) -> Tensor:
        """Map normed hidden states [B, T, W] to the queries [B, H, T, D] alone."""
        rows = slice(None, self.heads * self.head_dim) if self.owns_kv else slice(None)
        if type(self.qkv) is not nn.Linear:
            return self._turned(self._heads(self._part(x, rows)), self.q_norm, step)
        return project(
            x, self.qkv.weight[rows], self.head_dim,
            bias=None if self.qkv.bias is None else self.qkv.bias[rows],
            norm=None if self.q_norm is None else self.q_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            turn=None if step.cache.rotates else (step.rotation.cos, step.rotation.sin),
        )  # fmt: skip

    def keys_values(self, x: Tensor, step: Pass) -> tuple[Tensor, Tensor]:
        """Map normed hidden states [B, T, W] to the keys and values [B, H_kv, T, D] alone."""
        k, v = self._heads(self._part(x, slice(self.heads * self.head_dim, None))).chunk(2, dim=1)
        return self._turned(k, self.k_norm, step), v

    def read(self, q: Tensor, keys: Keys | None, step: Pass) -> tuple[Tensor, Tensor | None]:
        """Attend to what the cache gave; return the output [B, T, W] and the key mass."""
        if keys is None:
            nothing = q.new_zeros(len(q), q.shape[2], self.heads * self.head_dim)
            return self.out(nothing), None
        cache = step.cache
        if cache.rotates:
            for_queries, for_keys = cache.rotary_positions(self.source, step.places)
            q = step.rotated(q, for_queries)
            keys = step.rotations.keys(keys, for_keys, q)
        rule = cache.rule(self.layer, self.rule)
        mass_rows = cache.key_mass_rows(self.layer) if step.final else None
        standing = step.standing(rule, keys.positions)
        out, key_mass = attend(
            q, keys.k, keys.v, step.positions, standing, rule,
            mass_rows=mass_rows, mask=partial(step.mask, rule, standing), stored=keys.stored,
            each=cache.sees_each,
        )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2)), key_mass

    def _heads(self, rows: Tensor) -> Tensor:
        """Turn [B, T, heads D] into [B, heads, T, D]."""
        return rows.view(*rows.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        if type(self.qkv) is not nn.Linear:  # an adapter in its place: the weight is not all of it
            return torch.as_tensor(self.qkv(x)[..., rows])
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return F.linear(x, self.qkv.weight[rows], bias)

    def _turned(self, heads: Tensor, norm: RMSNorm | None, step: Pass) -> Tensor:
        """Norm and rotate queries or keys [B, heads, T, D]."""
        heads = heads if norm is None else norm(heads)
        return heads if step.cache.rotates else step.rotation(heads)


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
    """One decoder layer: x + attention, then + feed-forward (of x itself when parallel).

    Attributes:
        checkpointing: recompute in the backward pass instead of keeping what it needs: of a layer
            only its input, its keys and its values stay.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.parallel = config.parallel
        self.checkpointing = False
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm(config)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, step: Pass, onward: Onward = "all"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map the residual stream [B, T, W] to the next layer's, of the rows that go on.

        Where none do, return the keys and values: FSDP2 gathers the weights again when it meets the
        gradient of what a forward returned.
        """
        if onward != "all":
            k, v = self.attention.keys_values(self.attention_norm(x), step)
            step.cache.write(self.layer, k, v, step.positions)
            return (k, v) if onward == "none" else self._last(x[:, -1:], step)
        if self.checkpointing and torch.is_grad_enabled():
            return self._recomputed(x, step)
        attended, key_mass = self.attention(self.attention_norm(x), step)
        after = x + attended
        if step.final:
            step.cache.observe(self.layer, x, after, key_mass)
        return self._fed(x, after)

    def _last(self, x: Tensor, step: Pass) -> Tensor:
        """The rest of the layer for the last row [B, 1, W], whose keys are kept already."""
        step = step.last_row(x)
        q = self.attention.queries(self.attention_norm(x), step)
        attended, key_mass = self.attention.read(q, step.cache.read(self.attention.source), step)
        after = x + attended
        step.cache.observe(self.layer, x, after, key_mass)
        return self._fed(x, after)

    def _recomputed(self, x: Tensor, step: Pass) -> Tensor:
        """What the cache gives is read once, now: in the backward pass it holds something else."""
        attention, cache = self.attention, step.cache
        if attention.owns_kv:
            k, v = _checkpoint(lambda x: attention.keys_values(self.attention_norm(x), step), x)
            cache.write(self.layer, k, v, step.positions)
        keys = cache.read(attention.source)

        def rest(x: Tensor, *kv: Tensor) -> tuple[Tensor, Tensor]:
            q = attention.queries(self.attention_norm(x), step)
            read = None if keys is None else Keys(kv[0], kv[1], keys.positions)
            after = x + attention.read(q, read, step)[0]
            return after, self._fed(x, after)

        after, out = _checkpoint(rest, x, *(() if keys is None else keys.rows(x.dtype)))
        if step.final:
            cache.observe(self.layer, x, after, None)
        return torch.as_tensor(out)

    def _fed(self, x: Tensor, after: Tensor) -> Tensor:
        out: Tensor = after + self.mlp(self.mlp_norm(x if self.parallel else after))
        return out


def _checkpoint(compute: Callable[..., Any], *inputs: Tensor) -> Any:
    """Run `compute`, which is run again in the backward pass."""
    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)


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
