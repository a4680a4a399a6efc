"""Full attention as an eviction policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvlab.methods.budget.budget import Fixed
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import Opening
from kvlab.methods.cache.policy import Policy

if TYPE_CHECKING:
    from kvlab.methods.cache.ranking import InSlots


class FullPolicy(Policy):
    """Keeps every row."""

    def open(self, opening: Opening) -> Cache:
        if opening.stores_by_row():
            return super().open(opening)
        from kvlab.methods.cache.evicting import EvictingCache
        from kvlab.methods.cache.ranking import Newest

        return EvictingCache(Newest(self.params), opening, budget=Fixed(None))

    def in_slots(self) -> InSlots:
        from kvlab.methods.cache.ranking import All, InSlots

        return InSlots(All(self.params), Fixed(None))

    def capacity(self, layer: int, rows: int) -> int:
        return rows
