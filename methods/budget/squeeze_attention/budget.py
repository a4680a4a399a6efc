"""SqueezeAttention's budgets: from importances to groups, from groups to rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlab.methods.budget.budget import Budget, Evidence
from kvlab.methods.budget.division import divide
from kvlab.methods.budget.squeeze_attention.grouping import three_means
from kvlab.methods.budget.squeeze_attention.params import SqueezeParams

LEAST_P = 0.1
"""The least p that a prompt's own importances may ask for."""


class SqueezeAttention(Budget):
    """b(l) = p b for the layers of the group that attention changes least, the third.

    The others share what is left, alike: b(l) = (L - n3 p) b / (L - n3). Importance is measured in
    the prompt: the cosine between the residual stream before and after a layer's attention, the
    mean over its rows; high is unimportant. Of the decoder layers that read one KV layer the lowest
    counts. Groups: `three_means`.
    """

    params: SqueezeParams

    def __init__(self, params: SqueezeParams) -> None:
        super().__init__(params)
        self.importance = params.importance
        self.refresh = params.refresh

    def rows(self, evidence: Evidence) -> Tensor:
        values = _unimportance(evidence, self.params.importance)
        if self.params.per == "batch":
            weights = evidence.prompt[:, None].double()
            values = ((values * weights).sum(0) / weights.sum()).expand_as(values)
        kv = torch.stack([values[:, list(r)].amin(1) for r in evidence.readers], dim=1)
        shares = torch.stack([shares_of(row, self.params.p) for row in kv.tolist()])
        average = self.averages(evidence)[:, None]
        if self.params.rounding == "truncate":
            return self._truncated(shares, evidence)
        layers = len(evidence.readers)
        total = average[:, 0] * layers
        return divide(shares * average, total, evidence.least, evidence.most)

    def _truncated(self, shares: Tensor, evidence: Evidence) -> Tensor:
        """As the reference: the shares times the unrounded amount, cut to whole rows."""
        amount = self.params.tokens or self.params.share * evidence.prompt[:, None].double()
        rows = (shares * amount + 1e-9).long()
        return evidence.bounded(rows)


def shares_of(values: Sequence[float], p: float | None) -> Tensor:
    """Return what each layer keeps [K] float64, in averages: their mean is 1.

    Args:
        values: of each KV layer, high for the unimportant (the mean cosine).
        p: of the third group; None: as their own values say, the third group's mean of 1 - value
            over that of all layers, at least `LEAST_P` (ours).
    """
    groups = three_means(values)
    third = [group == 2 for group in groups]
    cut = sum(third)
    if not cut or cut == len(groups):
        return torch.ones(len(groups), dtype=torch.float64)
    if p is None:
        change = [1 - value for value in values]
        low = sum(c for c, is_third in zip(change, third, strict=True) if is_third) / cut
        mean = sum(change) / len(change)
        p = min(1.0, max(LEAST_P, low / mean)) if mean > 0 else 1.0
    other = (len(groups) - cut * p) / (len(groups) - cut)
    return torch.tensor([p if is_third else other for is_third in third], dtype=torch.float64)


def _unimportance(evidence: Evidence, importance: str) -> Tensor:
    """[B, layers] float64: the cosine, or how narrow a layer's attention is."""
    if importance == "cosine":
        assert evidence.cosines is not None
        return evidence.cosines
    assert evidence.spread is not None
    return 1 - evidence.spread
