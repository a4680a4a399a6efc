"""What training minimises: the loss of the counted tokens, and a teacher's distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel

if TYPE_CHECKING:
    from kvlab.methods.eviction.adore.labels import Aggregate


class Sums(NamedTuple):
    """Sums over a batch's targets, scalars: what to minimise, the plain loss, and the targets.

    They are sums, not means, so that micro-batches and ranks with unequal numbers of targets add up
    to the mean over all of them.
    """

    objective: Tensor
    nll: Tensor
    targets: Tensor


class Sparse(NamedTuple):
    """Attention as ADORE's fine-tuning reads it: the tokens that the teacher attends to most.

    top: how many. aggregate: over heads and layers.
    """

    top: int
    aggregate: Aggregate


class Objective(nn.Module):
    """The trained model with its loss; one call is one forward pass.

    Args:
        model: what is trained.
        teacher: a frozen model to learn from, or None.
        weight: of the teacher's part, 0 to 1. temperature: that softens both distributions.
        sparse: read what the teacher attends to alone, and learn from the text.
    """

    def __init__(
        self,
        model: LanguageModel,
        teacher: LanguageModel | None = None,
        weight: float = 0.0,
        temperature: float = 1.0,
        sparse: Sparse | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that it is no submodule: never trained, sharded or checkpointed.
        self._teacher = (teacher,)
        self.weight, self.temperature, self.sparse = weight, temperature, sparse

    @property
    def teacher(self) -> LanguageModel | None:
        """The frozen model that is learnt from."""
        return self._teacher[0]

    def forward(self, ids: Tensor, valid: Tensor | None, counts: Tensor) -> Sums:
        """Return the sums over tokens that the model predicts and that count.

        Args:
            ids: [B, T]. valid: [B, T] bool, None without padding. counts: [B, T] bool.
        """
        teacher = self.teacher
        if teacher is None or self.sparse is not None:
            score = self.model(ids, valid, self._reading(ids, valid))
            targets = score.scored & counts
            nll = score.nll.masked_fill(~targets, 0.0).sum()
            return Sums(nll, nll.detach(), targets.sum())
        logits, scored = self.model.predictions(ids, valid)
        targets = scored & counts
        chosen = logits[targets].float()
        nll = F.cross_entropy(chosen, ids[targets], reduction="sum")
        with torch.no_grad():
            taught, known = teacher.predictions(ids, valid)
        both = known[targets]
        away = divergence(chosen[both], taught[targets][both].float(), self.temperature)
        objective = (1 - self.weight) * nll + self.weight * away
        return Sums(objective, nll.detach(), targets.sum())

    def _reading(self, ids: Tensor, valid: Tensor | None) -> Method | None:
        """What rows may read; None: all before them."""
        if self.sparse is None:
            return None
        from kvlab.methods.eviction.adore.labels import attention, most_attended, under

        assert self.teacher is not None
        attended = attention(self.teacher, ids, valid, self.sparse.aggregate)
        return under(most_attended(attended, self.sparse.top)[:, 0])


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) summed over rows of logits [N, V], times the squared temperature.

    The square keeps the size of its gradients independent of the temperature (Hinton et al. 2015).
    """
    own = F.log_softmax(student / temperature, dim=-1)
    wanted = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(own, wanted, reduction="sum", log_target=True) * temperature**2
