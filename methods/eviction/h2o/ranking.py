"""H2O as a ranking: attention received so far, but for the newest rows."""

from __future__ import annotations

from torch import Tensor

from kvlab.kernels.evict import Stays
from kvlab.methods.cache.ranking import Ranking
from kvlab.methods.eviction.h2o.params import H2OParams


class H2O(Ranking):
    """score(j) = sum over all queries so far of the attention that key j got from them.

    Not divided by how many queries could see it, as in the reference. A KV head adds up its query
    heads, a shared KV layer all layers that read it. The newest `recent` of the budget stay; of the
    others the highest scores.
    """

    params: H2OParams
    by_head = True

    def __init__(self, params: H2OParams) -> None:
        super().__init__(params)
        self.grows = params.generated == "keep"
        self.in_cache = params.positions == "cache"

    def voters(self, prompt: bool) -> slice | None:
        return slice(None) if prompt or not self.grows else None

    def stays(self, budget: Tensor) -> Stays:
        # Half a row up: 7 of 12 is 7, whatever 7 / 12 rounds to.
        return Stays(recent=(budget * self.params.recent + 0.5).floor().long())
