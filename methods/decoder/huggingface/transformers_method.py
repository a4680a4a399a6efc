"""The method of a cache inside a transformers model, refused where it does not go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvlab.methods.axis import TRAIN_TIME, Choice, Method, MethodError
from kvlab.methods.budget.amount import Amount, shortfall
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import build_params, refuse_misfits, resolve


def method_of(
    apply: str | Mapping[str, Any] | Method, budget: float | int | None, sizes: DecoderConfig
) -> Method:
    """Return the method with its budget: see `kv_cache`.

    Raises:
        MethodError: it is no choice of a cache for a decoder of these sizes.
    """
    method = apply if isinstance(apply, Method) else resolve(apply)
    if budget is not None:
        method = _with_budget(method, budget)
    for axis, choice in method.choices.items():
        if axis in (*TRAIN_TIME, "prefill") and not choice.is_default:
            raise MethodError(f"{choice.value.name}: not a choice of the cache: take it out")
        for problem in choice.value.check(choice.params, sizes) if choice.value.check else ():
            raise MethodError(f"{choice.value.name}: {problem}")
    refuse_misfits(method, sizes)
    return method


def _with_budget(method: Method, budget: float | int) -> Method:
    choice, eviction = method.choices.get("budget"), method["eviction"].value
    if choice is None or "budget" not in eviction.consumes:
        raise MethodError(f"budget: '{eviction.name}' does not read the budget axis: leave it out")
    name = "tokens" if isinstance(budget, int) else "share"
    if not isinstance(choice.params, Amount):
        raise MethodError(f"budget: '{choice.value.name}' is not of one amount: say it in `apply`")
    params = build_params(choice.value.params, asdict(choice.params) | {name: budget})
    return Method(method.label, {**method.choices, "budget": Choice(choice.value, params)})


def refuse_short(method: Method, prompt: int) -> None:
    """Raise a MethodError where a share of a prompt of so many rows is too few for the eviction."""
    if problem := shortfall(method, prompt):
        raise MethodError(problem)
