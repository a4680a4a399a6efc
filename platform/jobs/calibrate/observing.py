"""What each layer's attention does to a prompt, seen in the model's own prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.attention import Rule
from kvlab.kernels.similarity import residual_cosine
from kvlab.methods.axis import Choice, Method, Value
from kvlab.methods.cache.ephemeral import one_pass
from kvlab.methods.cache.importance import spread
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.opening import Eviction, Opening
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve


class Seen(NamedTuple):
    """What a batch of prompts showed, by decoder layer; rows are tokens, or blocks.

    cosine [B, layers, T] float32: between the residual stream before and after a layer's attention
    (arXiv 2404.04793). spread [B, layers] float32: how evenly a layer attended, or None.
    """

    cosine: Tensor
    spread: Tensor | None


class Observing(Cache):
    """The cache of one pass, which also writes down what the decoder shows it.

    Args:
        rows: what hands out the rows of the pass.
        mass: whether to look at attention as well, which is then worked out in the open.
    """

    observes_all = True

    def __init__(self, rows: Cache, mass: bool) -> None:
        self._rows, self._wanted = rows, mass
        self._cosines: dict[int, list[Tensor]] = {}
        self._mass: dict[int, Tensor] = {}

    def plan(self, step: Step) -> Extra | None:
        return self._rows.plan(step)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._rows.write(layer, k, v, positions)

    def read(self, layer: int) -> Keys | None:
        return self._rows.read(layer)

    def rule(self, layer: int, own: Rule) -> Rule:
        return self._rows.rule(layer, own)

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None) if self._wanted else None

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        self._cosines.setdefault(layer, []).append(residual_cosine(before, after))
        if key_mass is not None:
            earlier = self._mass.get(layer)
            if earlier is not None:  # a decoder that runs row by row: one key more each time
                key_mass = key_mass + F.pad(earlier, (0, key_mass.shape[-1] - earlier.shape[-1]))
            self._mass[layer] = key_mass
        self._rows.observe(layer, before, after, key_mass)

    def finish(self) -> None:
        self._rows.finish()

    def nbytes(self) -> int:
        return self._rows.nbytes()

    def seen(self) -> Seen:
        """Return what was seen; a layer that found no key to read counts as evenly spread."""
        layers = range(len(self._cosines))
        cosine = torch.stack([torch.cat(self._cosines[i], dim=1) for i in layers], dim=1)
        if not self._wanted:
            return Seen(cosine, None)
        even = cosine.new_ones(len(cosine))
        found = [spread(self._mass[i]) if i in self._mass else even for i in layers]
        return Seen(cosine, torch.stack(found, dim=1))


@dataclass(frozen=True, slots=True)
class Watch:
    """The run-time choice that opens an `Observing`, and holds it afterwards."""

    mass: bool = False
    opened: list[Observing] = field(default_factory=list)


class Watching(Eviction):
    """Keeps nothing beyond the pass."""

    params: Watch

    def open(self, opening: Opening) -> Cache:
        cache = Observing(one_pass(opening.config), self.params.mass)
        self.params.opened.append(cache)
        return cache


WATCHING = Value(
    axis="eviction",
    name="observing",
    summary="watches a prefill",
    params=Watch,
    implementation="kvlab.platform.jobs.calibrate.observing:Watching",
)
"""Of no registry: nothing could be generated under it."""


def observe(model: LanguageModel, ids: Tensor, *, mass: bool) -> Seen:
    """Prefill prompts [B, T] and return what each layer's attention did.

    Args:
        ids: without padding: T is a multiple of the model's span.
        mass: see `Observing`.
    """
    watch = Watch(mass)
    choices = {**resolve({}).choices, "eviction": Choice(WATCHING, watch)}
    model.start(ids, new_tokens=0, apply=Method(WATCHING.name, choices))
    return watch.opened[0].seen()
