"""Full attention as an eviction policy."""

from __future__ import annotations

from kvlab.methods.cache.policy import Policy


class FullPolicy(Policy):
    """Keeps every row."""

    def capacity(self, layer: int, rows: int) -> int:
        return rows
