"""The cache of a pass that has no past: training and scoring."""

from __future__ import annotations

from torch import Tensor

from kvlab.kernels.attention import Rule
from kvlab.methods.cache.interface import Cache, Keys
from kvlab.methods.cache.policy import Policy


class EphemeralCache(Cache):
    """Hands each layer the rows of this very pass, and forgets them once they are read.

    Args:
        policy: whose rule the rows are read under: the pass then reads what a cache of that policy
            would have kept (see `Policy.rule`). None: the model's own rule.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy
        self._rows: dict[int, Keys] = {}

    def rule(self, layer: int, own: Rule) -> Rule:
        return own if self._policy is None else self._policy.rule(layer, own)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._rows[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys:
        return self._rows[layer]

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        del self._rows[layer]  # scoring holds the rows of one layer at a time

    def nbytes(self) -> int:
        return 0
