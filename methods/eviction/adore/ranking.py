"""ADORE as a ranking: the scores of now, but for the newest rows."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.evict import Stays
from kvlab.methods.budget.budget import Budget
from kvlab.methods.cache.opening import Opening
from kvlab.methods.cache.ranking import Ranking
from kvlab.methods.eviction.adore.controller import Controller, load
from kvlab.methods.eviction.adore.params import AdoreParams
from kvlab.methods.eviction.adore.scores import ControllerScores, MassScores, Scores

if TYPE_CHECKING:
    from kvlab.methods.cache.evicting import EvictingCache
    from kvlab.methods.cache.pool import PoolCache


class Adore(Ranking):
    """score(j) = what `Scores` says of j for the current token; the newest `recent` rows stay.

    One selection for all layers by default: where their budgets differ, a smaller one holds the
    best of a larger one.
    """

    params: AdoreParams
    current: tuple[dict[int, int], Tensor]
    """KV layer -> its number; and by number [L, B, rows + 1] float32 the scores that count now, by
    position. `AdoreCache` keeps them."""

    @property
    def by_layer(self) -> bool:  # type: ignore[override]
        return self.params.per == "layer"

    def open(self, opening: Opening, budget: Budget | None = None) -> EvictingCache:
        from kvlab.methods.eviction.adore.cache import AdoreCache

        return AdoreCache(Adore(self.params), opening, self.scores(opening), budget)

    def pooled(self) -> type[PoolCache]:
        from kvlab.methods.eviction.adore.pool import AdorePool

        return AdorePool

    def scores(self, opening: Opening) -> Scores:
        """Return who scores, as the params say.

        Raises:
            KvlabError: no controller, or one of another model.
        """
        batch, rows, device = opening.batch, opening.rows, opening.device
        layers = len(opening.config.kv_layers) if self.by_layer else 1
        if self.params.scores == "rule":
            return MassScores(batch, rows, layers, device)
        if not self.params.controller:
            raise KvlabError(
                "adore: needs a trained controller: name the job that trains one (controller: JOB "
                "beside apply), or choose scores: rule, which needs none"
            )
        controller = _loaded(self.params.controller, str(device))
        own, other = opening.config, controller.config
        if (own.vocab_size, own.width) != (other.vocab_size, other.width):
            raise KvlabError(
                f"{self.params.controller}: this controller was trained on a model with "
                f"vocab_size {other.vocab_size} and width {other.width}, "
                f"this one has {own.vocab_size} and {own.width}"
            )
        if controller.config.layers != layers:
            raise KvlabError(
                f"{self.params.controller}: this controller scores for "
                f"{controller.config.layers} layers each, {layers} are needed: label with the "
                "same 'per' as adore's"
            )
        return ControllerScores(controller, batch, rows, device, opening.dtype)

    def stays(self, budget: Tensor) -> Stays:
        return Stays(recent=torch.full_like(budget, self.params.recent))

    def known_of(self, layers: tuple[int, ...]) -> Tensor:
        """The scores [n, B, rows + 1] that count now in KV layers; once where all score alike."""
        numbers, known = self.current
        found = [numbers[layer] for layer in layers]
        if len(known) == 1 or found == list(range(len(known))):
            return known
        return torch.stack([known[number] for number in found])


@lru_cache(maxsize=4)
def _loaded(folder: str, device: str) -> Controller:
    return load(Path(folder), torch.device(device))
