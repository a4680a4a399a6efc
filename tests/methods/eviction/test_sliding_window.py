"""A sliding window: the last tokens, the query's own included; nothing else is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve


def test_a_model_with_that_window_agrees(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    """The policy on a full model is the full policy on a model whose layers have the window."""
    full, windowed = tiny("llama"), tiny("llama", windows=(3, 3))
    text = ids(2, 9)
    by_policy = full.start(text, new_tokens=3, apply=resolve({"sliding_window": {"window": 3}}))
    by_model = windowed.start(text, new_tokens=3)
    for _ in range(3):
        torch.testing.assert_close(by_policy.logits, by_model.logits, rtol=1e-4, atol=1e-4)
        token = by_model.logits.argmax(-1)
        by_policy.step(token)
        by_model.step(token)
    assert by_policy.kv_bytes() == by_model.kv_bytes()


def test_what_left_the_window_is_forgotten(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    """In one layer, a token's logits depend on the last three tokens alone."""
    model = tiny("llama", layers=1)
    window = resolve({"sliding_window": {"window": 3}})
    a = ids(1, 8)
    other, inside = a.clone(), a.clone()
    other[:, :5] = (other[:, :5] + 1) % 53
    inside[:, 5] = (inside[:, 5] + 1) % 53
    first, second, third = (
        model.start(x, new_tokens=1, apply=window).logits for x in (a, other, inside)
    )
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, third, atol=1e-3)


def test_a_window_longer_than_the_text_is_full_attention(
    model: TokenModel, ids: Callable[..., Tensor]
) -> None:
    text = ids(2, 6)
    full = model.start(text, new_tokens=1)
    wide = model.start(text, new_tokens=1, apply=resolve({"sliding_window": {"window": 100}}))
    torch.testing.assert_close(full.step(text[:, 0]), wide.step(text[:, 0]))
    assert full.kv_bytes() == wide.kv_bytes()


@pytest.mark.parametrize("window", [0, -3, 1.5, "8", True, 1 << 30])
def test_impossible_windows(window: object) -> None:
    with pytest.raises(MethodError, match="window"):
        resolve({"sliding_window": {"window": window}})


def test_unknown_parameters() -> None:
    with pytest.raises(MethodError, match="no parameter 'size'; it has: window"):
        resolve({"sliding_window": {"size": 8}})
