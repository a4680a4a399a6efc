"""Sliding window attention as an eviction: a ring of slots, or the newest under a budget."""

from __future__ import annotations

from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Method
from kvlab.methods.budget.budget import Fixed
from kvlab.methods.cache.ephemeral import one_pass
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import Eviction, Opening
from kvlab.methods.cache.policy import Policy
from kvlab.methods.cache.ranking import InSlots, Newest
from kvlab.methods.cache.windows import ReadsWindow, window_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.sliding_window.params import SlidingWindowParams


class SlidingWindow(Eviction):
    """Keeps the newest rows: `window` of them, or as many as the budget says.

    With `window` a prompt is read through it too; under a budget it is read in full, then cut.
    """

    params: SlidingWindowParams

    def open(self, opening: Opening) -> Cache:
        window = self.params.window
        if window is None:
            return EvictingCache(Newest(self.params), opening)
        if opening.stores_by_row():
            return Ring(self.params).open(opening)
        past = Fixed(window - 1)
        return EvictingCache(Newest(self.params), opening, budget=past, reads=ReadsWindow(window))

    def scoring(
        self, config: DecoderConfig, method: Method, passes: int | None = None
    ) -> Cache | None:
        window = self.params.window
        if window is None:
            past = window_of(method)
            window = None if past is None else past + 1
        return None if window is None else one_pass(config, ReadsWindow(window), passes)

    def in_slots(self) -> InSlots | None:
        return InSlots(Newest(self.params), None) if self.params.window is None else None


class Ring(Policy):
    """The last `window` rows in a ring of slots."""

    params: SlidingWindowParams

    def capacity(self, layer: int, rows: int) -> int:
        assert self.params.window is not None
        return min(self.params.window, rows)

    def rule(self, layer: int, own: Rule) -> Rule:
        assert self.params.window is not None
        return ReadsWindow(self.params.window).rule(layer, own)
