"""Attention whose mask comes from positions: the plain torch twin every kernel is tested against."""

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
    group = q.shape[1] // k.shape[1]
    packed = q_positions is None
    causal = packed and not rule.strict and (rule.window is None or rule.window >= q.shape[2])
    if mask is None and not causal and (packed or k_positions is not None):
        if packed:
            q_positions = k_positions = torch.arange(q.shape[2], device=q.device)[None]
        assert q_positions is not None
        assert k_positions is not None
        mask = rule.allows(q_positions, k_positions)
    if want_key_mass:
        return _attend_and_weigh(q, k, v, mask, causal)
    if group == 1:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal), None
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    return out, None


def _attend_and_weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with its probabilities in the open, softmax in float32."""
    batch, heads, rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).float() * dim**-0.5
    if causal:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        mask = mask.unsqueeze(2)
        scores = scores.masked_fill(~mask, float("-inf"))
    shares = scores.softmax(-1)
    if mask is not None:
        shares = shares.masked_fill(~mask, 0.0)  # a row that may read nothing is all NaN
    out = (shares.to(v.dtype) @ v.unsqueeze(2)).reshape(batch, heads, rows, v.shape[-1])
    return out, shares.sum(-2).reshape(batch, heads, keys)
