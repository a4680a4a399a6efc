"""Observed attention as a ranking: the mean attention a prompt token got."""

from __future__ import annotations

from torch import Tensor

from kvlab.methods.cache.ranking import Ranking, Rows


class ObservedAttention(Ranking):
    """score(j) = attention that key j got, divided by the queries that could see it."""

    by_head = True
    grows = True

    def voters(self, prompt: bool) -> slice | None:
        return slice(None) if prompt else None

    def rank(self, rows: Rows) -> Tensor:
        assert rows.scores is not None
        return rows.scores / (rows.newest + 1 - rows.positions)
