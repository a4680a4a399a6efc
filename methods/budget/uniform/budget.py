"""Uniform budget."""

from __future__ import annotations

from torch import Tensor

from kvlab.methods.budget.budget import Budget, Evidence


class Uniform(Budget):
    """b(l) = b."""

    def rows(self, evidence: Evidence) -> Tensor:
        return self.averages(evidence)[:, None].expand(-1, len(evidence.readers))
