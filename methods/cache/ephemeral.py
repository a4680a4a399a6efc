"""The cache of a pass that has no past: training and scoring."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvlab.kernels.attention import Rule
from kvlab.methods.cache.interface import Cache, Keys
from kvlab.methods.cache.opening import last_reads
from kvlab.methods.cache.policy import Policy


class EphemeralCache(Cache):
    """Hands each layer the rows of this very pass, and forgets them once they are read.

    Args:
        policy: whose rule the rows are read under: the pass then reads what a cache of that policy
            would have kept (see `Policy.rule`). None: the model's own rule.
        kv_of: the KV layer that each decoder layer reads; empty: its own.
    """

    def __init__(self, policy: Policy | None = None, kv_of: Sequence[int] = ()) -> None:
        self._policy = policy
        self._ends = last_reads(kv_of) if kv_of else None
        self._rows: dict[int, Keys] = {}

    def rule(self, layer: int, own: Rule) -> Rule:
        return own if self._policy is None else self._policy.rule(layer, own)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._rows[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys:
        return self._rows[layer]

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        """Let go of the rows that no later layer reads: without sharing, one layer is held."""
        ended = layer if self._ends is None else self._ends.get(layer)
        if ended is not None:
            del self._rows[ended]

    def nbytes(self) -> int:
        return 0
