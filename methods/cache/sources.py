"""Which of the cache's modules an eviction runs, for `Value.sources`. No torch.

A pass that has no past runs none of them; what a server runs beside them no value names.
"""

from __future__ import annotations

BY_NUMBER = ("kvlab.methods.cache.policy", "kvlab.methods.cache.slots")
"""Rows are kept by their number: a `Policy`."""

BY_RANK = (
    "kvlab.methods.cache.evicting",
    "kvlab.methods.cache.importance",
    "kvlab.methods.cache.ranking",
    "kvlab.methods.cache.table",
    "kvlab.methods.cache.windows",
)
"""Rows are ranked: a `Ranking`."""
