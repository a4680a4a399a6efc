"""The run-time axes of a method decide the cache; a choice that nothing reads is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.axis import AxisName, Choice, Method, MethodError, Value
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import Eviction, Opening, one_pass_cache, scores_in_one_pass
from kvlab.methods.cache.storage import PlainStorage, Space
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import REGISTRY, resolve


@dataclass(frozen=True, slots=True)
class Nothing:
    """No parameters."""


class Halved(PlainStorage):
    """Rows in bfloat16, given back in the model's dtype."""

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space._replace(dtype=torch.bfloat16))
        self.dtype = space.dtype

    def put(self, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        super().put(slots, k.bfloat16(), v.bfloat16())

    def get(self, rows: int) -> tuple[Tensor, Tensor]:
        k, v = super().get(rows)
        return k.to(self.dtype), v.to(self.dtype)


class Everything(Eviction):
    """An eviction that opens the cache itself and reads the budget axis."""

    opened: list[Opening] = []  # noqa: RUF012

    def open(self, opening: Opening) -> Cache:
        self.opened.append(opening)
        return resolve({})["eviction"].value.load()(None).open(opening)  # type: ignore[no-any-return]


def row_bytes(config: DecoderConfig, method: Method, itemsize: int) -> float:
    return 2 * config.kv_heads * config.head_dim * 2


@pytest.fixture(autouse=True)
def values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Values of axes that have none yet, as a later method would register them."""
    module = ModuleType("kvlab_later")
    for attribute in (Halved, Everything, row_bytes):
        setattr(module, attribute.__name__, attribute)
    monkeypatch.setitem(sys.modules, "kvlab_later", module)
    REGISTRY.names()
    made: list[tuple[AxisName, str, str, tuple[AxisName, ...]]] = [
        ("precision", "halved", "Halved", ()),
        ("budget", "pyramid", "Nothing", ()),
        ("eviction", "everything", "Everything", ("budget",)),
    ]
    for axis, name, attribute, consumes in made:
        value = Value(
            axis, name, "", Nothing, f"kvlab_later:{attribute}", "kvlab_later", consumes=consumes
        )
        monkeypatch.setitem(REGISTRY._values, name, value)
    yield
    Everything.opened.clear()


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ({"pyramid": {}}, "budget 'pyramid' would change nothing: eviction 'full_attention' does"),
        ({"halved": {}, "everything": {}}, "precision 'halved' would change nothing: eviction 'ev"),
    ],
)
def test_a_choice_that_nothing_reads(written: dict[str, Any], error: str) -> None:
    with pytest.raises(MethodError, match=error) as raised:
        resolve(written)
    assert "\n" not in str(raised.value)


def test_a_method_put_together_by_hand_is_refused_too(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    pyramid = REGISTRY.find("pyramid")
    assert isinstance(pyramid, Value)
    method = Method("odd", {**resolve({}).choices, "budget": Choice(pyramid, Nothing())})
    model = tiny("llama")
    for use in (
        lambda: model.start(ids(1, 3), new_tokens=1, apply=method),
        lambda: one_pass_cache(model.config, method),
        lambda: cost_of(model.config, method),
    ):
        with pytest.raises(MethodError, match="would change nothing"):
            use()


def test_the_eviction_opens_the_cache(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    method = resolve({"everything": {}, "pyramid": {}})
    model, text = tiny("llama"), ids(2, 5)
    session = model.start(text, new_tokens=3, apply=method)
    torch.testing.assert_close(session.logits, model.start(text, new_tokens=3).logits)
    (opening,) = Everything.opened
    assert (opening.batch, opening.rows, opening.config) == (2, 8, model.config)
    assert opening.method["budget"].value.name == "pyramid"
    assert not scores_in_one_pass(model.config, method)


@pytest.mark.parametrize("eviction", ["full_attention", "sliding_window"])
def test_precision_is_a_storage(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], eviction: str
) -> None:
    model, text = tiny("llama"), ids(2, 30)
    params = {"window": 20} if eviction == "sliding_window" else {}
    plain, halved = resolve({eviction: params}), resolve({eviction: params, "halved": {}})
    a, b = (model.start(text, new_tokens=2, apply=m) for m in (plain, halved))
    for _ in range(2):
        torch.testing.assert_close(a.logits, b.logits, rtol=0.1, atol=0.1)
        token = a.logits.argmax(-1)
        a.step(token)
        b.step(token)
    assert not torch.equal(a.logits, b.logits)
    tables = 8 * 2 * min(32, params.get("window", 32))
    predicted = [cost_of(model.config, m).kv_bytes(32, 4) for m in (plain, halved)]
    assert [a.kv_bytes() - tables, b.kv_bytes() - tables] == [2 * n for n in predicted]
    assert predicted[0] == 2 * predicted[1]
    assert not scores_in_one_pass(model.config, halved)
