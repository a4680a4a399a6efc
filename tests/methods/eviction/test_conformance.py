"""What every value of the eviction axis must do; a new one is tested by being registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import REGISTRY, resolve

EVICTIONS = REGISTRY.values("eviction")


def small(value: Value) -> Method:
    """The value with every count at 4, so that a short text is evicted from."""
    hints = get_type_hints(value.params, include_extras=True)
    ranged = {
        field.name: 4
        for field in fields(value.params)
        for note in get_args(hints[field.name])
        if isinstance(note, Range) and note.low <= 4 <= note.high
    }
    return resolve({value.name: ranged})


@pytest.fixture(params=EVICTIONS, ids=lambda value: value.name)
def method(request: pytest.FixtureRequest) -> Method:
    return small(request.param)


def test_bytes_are_those_predicted(
    model: TokenModel, ids: Callable[..., Tensor], method: Method
) -> None:
    predicted = cost_of(model.config, method).kv_bytes(20, 4)
    session = model.start(ids(3, 12), new_tokens=8, apply=method)
    for _ in range(8):
        session.step(session.logits.argmax(-1))
    tables = 8 * 3 * 20 * len(set(model.config.windows or [None]))
    assert 3 * predicted <= session.kv_bytes() <= 3 * predicted + tables


def test_prompt_and_generated_tokens_are_treated_alike(
    model: TokenModel, ids: Callable[..., Tensor], method: Method
) -> None:
    """Cutting a text elsewhere into prompt and continuation changes no logits."""
    text = ids(2, 14)
    ends = []
    for prompt in (1, 6, 13):
        session = model.start(text[:, :prompt], new_tokens=14 - prompt, apply=method)
        for place in range(prompt, 14):
            session.step(text[:, place])
        ends.append(session.logits)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_see_its_batch(model: TokenModel, method: Method) -> None:
    prompts = [[7, 3, 9, 1, 4, 4, 2], [5], [8, 8, 2, 6]]
    together = generate(model, prompts, 8, apply=method)
    assert together == [generate(model, [p], 8, apply=method)[0] for p in prompts]
