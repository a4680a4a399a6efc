"""Rows that budgets leave a layer, predicted from sizes alone. Pure Python.

A value of the budget axis has one function in its cost module: `rows(config, method, layer,
prompt)`, the past rows that a KV layer keeps of a sequence whose prompt has so many rows; the mean,
where the division depends on what the prompt says.
"""

from __future__ import annotations

import importlib

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig

POSITION, SCORE = 8, 4
"""Bytes that a cache whose heads keep rows of their own has beside each: int64 and float32."""


def held(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Return the rows that a KV layer holds of a sequence, under the method's budget.

    That is after a decode step: its own row and the past that it may read. An eviction that
    `grows` cuts the prompt alone and keeps all that comes after it.

    Args:
        tokens: rows of the sequence, its prompt included.
        prompt: rows that came at once, in the beginning.
    """
    module = method["budget"].value.cost
    if module is None:
        raise ValueError(f"method '{method['budget'].value.name}' has no cost module")
    past: float = importlib.import_module(module).rows(config, method, layer, prompt)
    eviction = method["eviction"]
    if eviction.value.grows is not None and eviction.value.grows(eviction.params):
        return min(past, prompt) + tokens - prompt
    return min(past + 1, tokens)


def alike(method: Method) -> bool:
    """Whether all layers keep as many rows, whatever the prompt."""
    choice = method["budget"]
    return choice.value.default and getattr(choice.params, "tokens", None) is not None
