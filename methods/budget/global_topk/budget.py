"""One top-k over all layers and tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.methods.budget.budget import Budget, Evidence
from kvlab.methods.budget.division import divide


class GlobalTopK(Budget):
    """b(l) = how many of the K b highest-ranking (layer, token) pairs lie in layer l.

    A token's rank in a layer is the mean over the heads; rows that must stay count first. No layer
    falls below what its eviction needs.
    """

    importance = "ranks"

    def rows(self, evidence: Evidence) -> Tensor:
        ranks = evidence.ranks
        assert ranks is not None
        batch, layers, rows = ranks.shape
        total = self.averages(evidence) * layers
        order = ranks.flatten(1).argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(layers * rows, device=order.device).expand_as(order)
        )
        kept = (place < total[:, None].to(place.device)).view(batch, layers, rows)
        kept &= ranks > float("-inf")
        counts = kept.sum(2).cpu()
        return divide(counts.double(), total, evidence.least, evidence.most)
