"""Evictions that keep rows by their number alone: a prompt is read as it would be generated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

METHODS = {"full": resolve({}), "window": resolve({"sliding_window": {"window": 4}})}


@pytest.fixture(params=METHODS.values(), ids=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


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
