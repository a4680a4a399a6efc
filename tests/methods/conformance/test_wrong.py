"""Methods that are wrong, each in one way: the property it lacks catches it, the others do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.axis import Choice, Method, Value
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.opening import Eviction, Opening
from kvlab.methods.cache.slots import SlotCache
from kvlab.methods.cache.storage import PlainStorage
from kvlab.methods.conformance.cases import Case
from kvlab.methods.conformance.properties import PROPERTIES, Violation
from kvlab.methods.eviction.sliding_window.policy import Ring
from kvlab.methods.registry import resolve


@dataclass(frozen=True, slots=True)
class Window:
    """The window that all of them keep."""

    window: int = 10


class Sound(SlotCache):
    """Nothing wrong."""


class LeaksTheFuture(Sound):
    """Every row seems to stand in the first place."""

    def read(self, layer: int) -> Keys | None:
        keys = super().read(layer)
        if keys is None or self._seen:
            return keys
        rows = torch.zeros(len(keys.k), keys.k.shape[2], dtype=torch.long)
        return keys._replace(
            positions=rows if keys.positions is None else rows.minimum(keys.positions)
        )


class ForgetsPadding(Sound):
    """Padding is read as if it were text."""

    def plan(self, step: Step) -> Extra | None:
        positions = step.positions
        if positions is not None and step.rows > 1:
            positions = positions.clamp(min=0)
        return super().plan(step._replace(positions=positions))


class OneByOne(Sound):
    """A loop over the samples of a batch."""

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        each = [(a.clone(), b.clone()) for a, b in zip(k, v, strict=True)]
        k, v = (torch.stack(parts) for parts in zip(*each, strict=True))
        super().write(layer, k, v, positions)


class AsksTheDevice(Sound):
    """A number is fetched in every layer."""

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if k.shape[2] == 1 and k[0, 0, 0, 0] > 1e6:
            return
        super().write(layer, k, v, positions)


class CountsOnTheHost(Sound):
    """A step's positions are reckoned from a number of the host, which a replay does not have."""

    def plan(self, step: Step) -> Extra | None:
        if not self._seen or step.rows > 1:
            self.__dict__.pop("begun", None)
            return super().plan(step)
        assert step.positions is not None
        begun = self.__dict__.setdefault("begun", step.positions - self._seen)
        return super().plan(step._replace(positions=begun + self._seen))


class SavesTooLittle(Sound):
    """How many rows were seen is not saved."""

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"seen": torch.tensor([19, 1])}


class HoldsMore(Sound):
    """Keeps every key beside its slots, and says nothing of it."""

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self.__dict__.setdefault("log", []).append(k)
        super().write(layer, k, v, positions)


class Reserves(Sound):
    """Holds twice the slots that its cost predicts."""

    def __init__(self, policy: Any, opening: Opening) -> None:
        super().__init__(policy, opening)
        for store in self._layers.values():
            storage = store.storage
            assert isinstance(storage, PlainStorage)
            storage.k, storage.v = (torch.cat((x, x), 2) for x in (storage.k, storage.v))


class LosesTheFirst(Sound):
    """What lies in the first slot is never read again: a row, or padding."""

    def read(self, layer: int) -> Keys | None:
        keys = super().read(layer)
        if keys is None or not self._seen or self._seen >= 10:
            return keys
        return Keys(keys.k[:, :, 1:], keys.v[:, :, 1:], None)


LACKS: dict[type[SlotCache], set[str]] = {
    Sound: set(),
    LeaksTheFuture: {"causality", "parity"},
    ForgetsPadding: {"batch"},
    OneByOne: {"operations"},
    AsksTheDevice: {"no_waiting", "replays"},
    CountsOnTheHost: {"replays"},
    SavesTooLittle: {"save_and_load", "multi_turn"},
    HoldsMore: {"bytes_held"},
    Reserves: {"bytes_held"},
    LosesTheFirst: {"parity", "batch"},
}
"""What each lacks; where there are two, what it does is wrong in both ways."""


@pytest.fixture(params=LACKS, ids=lambda kind: kind.__name__)
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[SlotCache]:
    kind: type[SlotCache] = request.param

    class Opens(Eviction):
        def open(self, opening: Opening) -> Cache:
            return kind(Ring(self.params), opening)

    module = ModuleType("kvlab_wrong")
    module.Opens = Opens  # type: ignore[attr-defined]
    module.rows = lambda config, method, layer, tokens, prompt: min(10, tokens)  # type: ignore[attr-defined]
    module.prompt_window = lambda config, method, layer: 10  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvlab_wrong", module)
    return kind


def test_what_is_wrong_is_caught_by_its_property(wrong: type[SlotCache]) -> None:
    value = Value("eviction", "wrong", "", Window, "kvlab_wrong:Opens", cost="kvlab_wrong")
    method = Method("wrong", {**resolve({}).choices, "eviction": Choice(value, Window())})
    caught = {}
    for name, check in PROPERTIES.items():
        try:
            check(Case(method, "gqa"))
        except Violation as violation:
            caught[name] = str(violation)
    assert set(caught) == LACKS[wrong], caught
    assert all("\n" not in violation for violation in caught.values())
