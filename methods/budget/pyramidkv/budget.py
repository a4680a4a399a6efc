"""PyramidKV's budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.methods.budget.budget import Budget, Evidence
from kvlab.methods.budget.pyramidkv.schedule import rows


class Pyramid(Budget):
    """b(l) falls in equal steps from the bottom layer to the top; see `schedule`."""

    def rows(self, evidence: Evidence) -> Tensor:
        lengths: list[int] = evidence.prompt.tolist()
        layers = len(evidence.readers)
        found = [
            rows(self.params, layers, length, evidence.window, evidence.least) for length in lengths
        ]
        return torch.tensor(found).minimum(evidence.most[:, None])
