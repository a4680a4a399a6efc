"""What ADORE learns from: the tokens that are attended to most, and reading those alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Choice, Method, Value
from kvlab.methods.cache.ephemeral import EphemeralCache, one_pass
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import Eviction
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve

Aggregate = Literal["mean", "max"]


class _Attention(EphemeralCache):
    """The cache of one pass that writes down who attends to what: [B, T, T] over all layers."""

    observes_all = True
    sees_each = True

    def __init__(self, config: DecoderConfig, aggregate: Aggregate) -> None:
        super().__init__(config)
        self._aggregate, self._layers = aggregate, config.layers
        self.found: Tensor | None = None

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert key_mass is not None
        if self._aggregate == "mean":
            own = key_mass.mean(1) / self._layers
            self.found = own if self.found is None else self.found + own
        else:
            own = key_mass.amax(1)
            self.found = own if self.found is None else torch.maximum(self.found, own)
        super().observe(layer, before, after, key_mass)


@torch.no_grad()
def attention(
    model: LanguageModel, ids: Tensor, valid: Tensor | None = None, aggregate: Aggregate = "mean"
) -> Tensor:
    """How much each token [T] of texts attends to each other, over all heads and layers.

    Args:
        ids: [B, T]. valid: [B, T] bool, None without padding.
        aggregate: over heads and layers.

    Returns:
        [B, T, T] float32; with the mean, each row sums to 1.

    Raises:
        KvlabError: a model whose layers do not read the tokens before them in one pass.
    """
    if not isinstance(model, TokenModel):
        raise KvlabError("labels are what full attention over tokens attends to: not this model's")
    decoder = model.decoder
    cache = _Attention(decoder.config, aggregate)
    decoder.body(decoder.embed(ids), positions_of(valid), cache, ids)
    assert cache.found is not None
    return cache.found


def most_attended(attended: Tensor, top: int) -> Tensor:
    """The `top` most attended tokens of each: a mask [B, T, T]; of fewer before it, all.

    Args: attended: [B, T, T], see `attention`.
    """
    rows = attended.shape[-1]
    best = attended.topk(min(top, rows), dim=-1)
    mark = torch.zeros_like(attended, dtype=torch.bool)
    return mark.scatter_(-1, best.indices, best.values > 0)


@dataclass(frozen=True, eq=False)
class Marked(Rule):
    """Of the rows of one whole pass, a query reads those that are marked for it.

    Attributes:
        marks: [B, T, T]; a query's own row is read whether it is marked or not.
    """

    marks: Tensor | None = None

    def is_causal(self, rows: int, by: int = 0) -> bool:
        return False

    def allows(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        assert self.marks is not None
        own = torch.eye(self.marks.shape[1], dtype=torch.bool, device=self.marks.device)
        return super().allows(q_positions, k_positions) & (self.marks | own).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Marks:
    """What `under` reads: [B, T, T]."""

    marks: Tensor


class _Reading(Eviction):
    """Scores whole texts under `Marks`."""

    params: Marks

    def open(self, opening: object) -> Cache:
        raise KvlabError("a sparse mask of whole texts cannot be generated under")

    def scoring(
        self, config: DecoderConfig, method: Method, passes: int | None = None
    ) -> Cache | None:
        return one_pass(config, self, passes)

    def rule(self, layer: int, own: Rule) -> Rule:
        return Marked(own.strict, own.window, own.sinks, self.params.marks)


_READING = Value(
    axis="eviction",
    name="marked",
    summary="reads what is marked",
    params=Marks,
    implementation="kvlab.methods.eviction.adore.labels:_Reading",
)


def under(marks: Tensor) -> Method:
    """The run-time choice under which one pass over texts reads what is marked [B, T, T] alone."""
    choices = {**resolve({}).choices, "eviction": Choice(_READING, Marks(marks))}
    return Method(_READING.name, choices)
