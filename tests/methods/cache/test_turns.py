"""Turns of unequal length: each sequence of a batch keeps what it keeps alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.decoder.generation import left_pad
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.model import Session
from kvlab.methods.registry import resolve

PROMPTS = [[*range(3, 20)], [50, 2, 9, 9, 31, 4, 8, 40, 1], [*range(30, 43)]]
TURNS = [[5, 6], [20, 21, 22, 23], [7, 1, 49]]
METHODS: list[dict[str, Any]] = [
    {"streaming_llm": {"sinks": 2, "turns": True}, "uniform": {"tokens": 9}},
    {"streaming_llm": {"sinks": 1}, "squeeze_attention": {"share": 0.5}},
    {"sliding_window": {}, "per_layer": {"tokens": [3, 7, 5]}},
    {"h2o": {}, "squeeze_attention": {"share": 0.5, "refresh": 2}},
    {"h2o": {"positions": "cache"}, "pyramidkv": {"share": 0.4}},
    {"snapkv": {"window": 2}, "global_topk": {"share": 0.5}},
    {"h2o": {}, "uniform": {"share": 0.4}, "kivi": {"group": 8, "residual": 8}},
]


def talk(session: Session, turn: Tensor, valid: Tensor | None) -> Tensor:
    """The last logits after steps, a turn and its answer."""
    for token in (3, 4, 5):
        session.step(torch.full((len(turn),), token))
    session.extend(turn, valid, new_tokens=3)
    for token in (6, 7, 8):
        session.step(torch.full((len(turn),), token))
    return session.logits


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
@pytest.mark.parametrize("written", METHODS, ids=str)
def test_turns_of_unequal_length(
    tiny: Callable[..., TokenModel], family: str, written: dict[str, Any]
) -> None:
    """Room is made for a sequence's own turn, not for the longest of the batch."""
    model, method, cpu = tiny(family, layers=3).double(), resolve(written), torch.device("cpu")
    ids, valid = left_pad(PROMPTS, cpu)
    together = talk(model.start(ids, valid, new_tokens=10, apply=method), *left_pad(TURNS, cpu))
    for found, prompt, turn in zip(together, PROMPTS, TURNS, strict=True):
        alone = model.start(torch.tensor([prompt]), new_tokens=10, apply=method)
        expected = talk(alone, torch.tensor([turn]), None)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
