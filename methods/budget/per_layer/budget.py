"""An explicit budget for every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.budget.budget import Budget, Evidence


class PerLayer(Budget):
    """b(l) as listed."""

    def rows(self, evidence: Evidence) -> Tensor:
        lengths: list[int] = evidence.prompt.tolist()
        rows = torch.tensor([self.params.rows(length) for length in lengths])
        if rows.shape[1] != len(evidence.readers):
            raise KvlabError(
                f"per_layer: the model has {len(evidence.readers)} layers that own keys and "
                f"values, found {rows.shape[1]} numbers"
            )
        return evidence.bounded(rows)
