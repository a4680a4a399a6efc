"""Attention whose mask comes from positions: the torch twin that every kernel is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1
"""The position of a row that holds nothing: padding, or a cache slot not yet written."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys a query may read, from the two positions alone (query p, key j).

    Attributes:
        strict: j < p instead of j <= p (upward sharing). A query with no key left gives zero.
        window: keep only p - j < window (tokens, the query's own included). None: no window.
        sinks: positions j < sinks are exempt from the window.
    """

    strict: bool = False
    window: int | None = None
    sinks: int = 0

    def is_causal(self, rows: int) -> bool:
        """Whether among so many packed rows every query reads exactly its past and itself."""
        return not self.strict and (self.window is None or self.window >= rows)

    def allows(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the mask [B, 1 or H_kv, T, S], true where query t may read key s.

        Args:
            q_positions: [B, T] integer; EMPTY rows read nothing.
            k_positions: [B, S], or [B, H_kv, S] where each KV head keeps its own rows.
        """
        p = q_positions[:, None, :, None]
        j = k_positions[:, None, None, :] if k_positions.dim() == 2 else k_positions[:, :, None, :]
        allowed = (j >= 0) & ((j < p) if self.strict else (j <= p))
        if self.window is not None:
            allowed = allowed & ((p - j < self.window) | (j < self.sinks))
        return allowed


CAUSAL = Rule()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    rule: Rule = CAUSAL,
    want_key_mass: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, grouped queries included.

    Args:
        q: [B, H, T, D]; already rotated.
        k: [B, H_kv, S, D]; H is a multiple of H_kv.
        v: [B, H_kv, S, D_v].
        q_positions: [B, T]. None states that queries and keys are the same rows in order, none
            empty (training on packed text), so that the fused causal path may be used.
        k_positions: [B, S] or [B, H_kv, S]; EMPTY marks rows that hold nothing. None beside given
            `q_positions` states that every query may read every key (a decode step over a cache
            without empty rows), so that no mask is needed.
        rule: what a query may read.
        want_key_mass: also return each key's attention summed over the queries.
        mask: `rule.allows(q_positions, k_positions)` where the caller has it already (layers share
            it); a kernel that masks from positions ignores it.

    Returns:
        out [B, H, T, D_v], zero for a query that may read nothing; and the key mass
        [B, H, S] in float32, or None.
    """
    packed = q_positions is None
    causal = packed and rule.is_causal(q.shape[2])
    if packed and not causal and mask is None:
        q_positions = k_positions = torch.arange(q.shape[2], device=q.device).unsqueeze(0)
    if mask is None and q_positions is not None and k_positions is not None:
        mask = rule.allows(q_positions, k_positions)
    if want_key_mass:
        return _attend_and_weigh(q, k, v, mask, causal)
    if q.shape[2] == 1 and not rule.strict:
        return _attend_one(q, k, v, mask), None
    return _attend_many(q, k, v, mask, causal), None


def _attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query row per sequence: the query heads of a KV head become its rows.

    No key is repeated in memory, and on CPU the kernel is faster than with `enable_gqa`.
    """
    batch, heads, _, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(grouped, k, v, mask)
    return out.reshape(batch, heads, 1, v.shape[-1])


def _attend_many(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(group, dim=1)
    if (
        q.device.type == "cpu"
    ):  # its kernel takes groups, and gives zero for a row that reads nothing
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=group > 1)
    if group > 1:  # CUDA's fused kernels take a mask or groups, not both
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    readable = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, mask | ~readable)
    return out.masked_fill(~readable, 0.0)


def _attend_and_weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with its probabilities in the open; scores and softmax in float32."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, rows, dim).float() * dim**-0.5
    scores = grouped @ k.float().unsqueeze(2).transpose(-1, -2)  # [B, H_kv, G, T, S]
    if causal:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1)
    if mask is not None:
        shares = shares * mask.unsqueeze(2)  # a row that may read nothing gives zero
    out = (shares.to(v.dtype) @ v.unsqueeze(2)).reshape(batch, heads, rows, v.shape[-1])
    return out, shares.sum(-2).reshape(batch, heads, keys)
