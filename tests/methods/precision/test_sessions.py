"""Precisions in a model's cache, under evictions and budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.cache.opening import open_cache
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

KIVI = {"bits": 4, "group": 8, "residual": 8}
PRECISIONS: list[dict[str, Any]] = [{"int8": {}}, {"fp8": {}}, {"kivi": KIVI}]
EVICTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": {"window": 9}},
    {"h2o": {}, "uniform": {"tokens": 10}},
    {"streaming_llm": {"sinks": 2}, "squeeze_attention": {"tokens": 10}},
    {"snapkv": {"window": 4}, "uniform": {"tokens": 10}},
]
PROMPTS = [[7, 3, 9, 1, 4, 4, 2] * 4, [5], [8, 8, 2, 6] * 3]


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda written: next(iter(written)))
def test_a_sample_does_not_see_its_batch(
    tiny: Callable[..., TokenModel], eviction: dict[str, Any], precision: dict[str, Any]
) -> None:
    model, method = tiny("qwen3"), resolve(eviction | precision)
    together = generate(model, PROMPTS, 30, apply=method)
    assert together == [generate(model, [prompt], 30, apply=method)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda written: next(iter(written)))
def test_logits_are_near_those_of_the_full_cache(
    model: TokenModel, ids: Callable[..., Tensor], precision: dict[str, Any]
) -> None:
    text = ids(2, 60)
    exact, found = (
        model.start(text[:, :40], new_tokens=20, apply=method)
        for method in (None, resolve(precision))
    )
    assert torch.equal(exact.logits, found.logits)  # a prompt is read before it is stored
    errors = []
    for tokens in text[:, 40:].unbind(1):
        errors.append((found.step(tokens) - exact.step(tokens)).std() / exact.logits.std())
    assert 0 < float(torch.stack(errors).mean()) < 0.15


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda written: next(iter(written)))
@pytest.mark.parametrize("family", ["llama", "llama3", "neox"])
def test_live_bytes_are_those_predicted(
    tiny: Callable[..., TokenModel],
    ids: Callable[..., Tensor],
    family: str,
    precision: dict[str, Any],
) -> None:
    model, method = tiny(family), resolve(precision)
    predicted = cost_of(model.config, method).kv_bytes(40, 4)
    session = model.start(ids(3, 30), new_tokens=10, apply=method)
    for _ in range(10):
        session.step(session.logits.argmax(-1))
    tables = 3 * (8 * 40 + 8)
    assert 3 * predicted <= session.kv_bytes() <= 3 * predicted + tables


@pytest.mark.parametrize("eviction", EVICTIONS[:3], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda written: next(iter(written)))
def test_a_turn_is_what_its_tokens_are(
    tiny: Callable[..., TokenModel],
    ids: Callable[..., Tensor],
    eviction: dict[str, Any],
    precision: dict[str, Any],
) -> None:
    """A saved cache goes on alike, too."""
    model, method = tiny("qwen3"), resolve(eviction | precision)
    decoder, text = model.decoder, ids(2, 40)
    places = torch.arange(40).expand(2, 40)
    with torch.inference_mode():
        first, second = (
            open_cache(decoder.config, method, batch=2, tokens=40,
                       device=text.device, dtype=torch.float32)
            for _ in range(2)
        )  # fmt: skip
        for rows in (slice(0, 25), slice(25, 26), slice(26, 31)):
            decoder.body(decoder.embed(text[:, rows]), places[:, rows], first, text[:, rows])
        second.restore({name: part.clone() for name, part in first.state().items()})
        for column in range(31, 40):
            rows = slice(column, column + 1)
            logits = [
                decoder.head(decoder.body(decoder.embed(text[:, rows]), places[:, rows], cache,
                                          text[:, rows]))
                for cache in (first, second)
            ]  # fmt: skip
            assert torch.equal(*logits)
