"""Sliding window attention as an eviction policy."""

from __future__ import annotations

from dataclasses import replace

from kvlab.kernels.attention import Rule
from kvlab.methods.cache.policy import Policy
from kvlab.methods.eviction.sliding_window.params import SlidingWindowParams


class SlidingWindowPolicy(Policy):
    """Keeps the last `window` rows; the prompt is read under the same rule."""

    params: SlidingWindowParams

    def capacity(self, layer: int, rows: int) -> int:
        return min(self.params.window, rows)

    def rule(self, layer: int, own: Rule) -> Rule:
        window = self.params.window
        return replace(own, window=window if own.window is None else min(window, own.window))
