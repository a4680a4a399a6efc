"""What ADORE learns from: the tokens that are attended to most, and reading those alone."""

from __future__ import annotations

from collections import Counter
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
from kvlab.methods.eviction.adore.params import Per
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve

Aggregate = Literal["mean", "max"]


class _Attention(EphemeralCache):
    """The cache of one pass that writes down who attends to what: [B, T, T] of layers together."""

    observes_all = True
    sees_each = True

    def __init__(self, config: DecoderConfig, aggregate: Aggregate, per: Per) -> None:
        super().__init__(config)
        kvs = config.kv_of if per == "layer" else (0,) * config.layers
        self._aggregate, self._group, self._layers = aggregate, kvs, Counter(kvs)
        self._found: dict[int, Tensor] = {}

    def found(self) -> Tensor:
        """[B, L, T, T], KV layers in order; one for all of them together."""
        return torch.stack([attended for _, attended in sorted(self._found.items())], dim=1)

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert key_mass is not None
        group = self._group[layer]
        mean = self._aggregate == "mean"
        own = key_mass.mean(1) / self._layers[group] if mean else key_mass.amax(1)
        known = self._found.get(group, torch.zeros_like(own))
        self._found[group] = known + own if mean else torch.maximum(known, own)
        super().observe(layer, before, after, key_mass)


@torch.no_grad()
def attention(
    model: LanguageModel,
    ids: Tensor,
    valid: Tensor | None = None,
    aggregate: Aggregate = "mean",
    per: Per = "model",
) -> Tensor:
    """How much each token [T] of texts attends to each other, over all heads and layers.

    Args:
        ids: [B, T]. valid: [B, T] bool, None without padding.
        aggregate: over heads and layers.
        per: all layers of the model together, or those that read one KV layer.

    Returns:
        [B, L, T, T] float32, L = 1 for the model; with the mean, each row sums to 1.

    Raises:
        KvlabError: a model whose layers do not read the tokens before them in one pass.
    """
    if not isinstance(model, TokenModel):
        raise KvlabError("labels are what full attention over tokens attends to: not this model's")
    decoder = model.decoder
    cache = _Attention(decoder.config, aggregate, per)
    decoder.body(decoder.embed(ids), positions_of(valid), cache, ids)
    return cache.found()


def most_attended(attended: Tensor, top: int) -> Tensor:
    """The `top` most attended tokens of each: a mask [..., T, T]; of fewer before it, all.

    Args: attended: [..., T, T], see `attention`.
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
