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
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, grouped queries included.

    Args:
        q: [B, H, T, D]; already rotated.
        k: [B, H_kv, S, D]; H is a multiple of H_kv.
        v: [B, H_kv, S, D_v].
        q_positions: [B, T]. None states that queries and keys are the same rows in order, none
            empty (training on packed text), so that the fused causal path may be used.
        k_positions: [B, S] or [B, H_kv, S]; EMPTY marks rows that hold nothing.
        rule: what a query may read.
        want_key_mass: also return each key's attention summed over the queries.

    Returns:
        out [B, H, T, D_v], zero for a query that may read nothing; and the key mass
        [B, H, S] in float32, or None.
    """
    raise NotImplementedError
