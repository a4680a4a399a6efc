"""Budgets that a calibrate job fixed, where a later job asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import least_rows
from kvlab.platform.jobs.kind import Parent, Surroundings
from kvlab.platform.jobs.model import lineage, method_of

ROLE = "budgets"
"""The field, the role and the spec's key by which a job takes the budgets of a calibrate job."""
_SOURCES = (
    "kvlab.methods.budget.amount",
    "kvlab.methods.budget.division",
    "kvlab.methods.budget.per_layer",
    "kvlab.platform.jobs.calibrate.fixed",
)


def sources(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that decide a result where `spec` takes budgets."""
    return _SOURCES if spec.get(ROLE) else ()


def problems(apply: Method, around: Surroundings) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where a job's `apply` cannot take the budgets that it refers to."""
    parent = around.parents.get(ROLE)
    if parent is None or parent.kind != "calibrate":
        return
    budget, eviction = apply["budget"], apply["eviction"]
    if not budget.value.default:
        yield (
            ROLE,
            f"apply chooses the budget '{budget.value.name}' already: leave one of the two out "
            "(how much is divided may be given by uniform: {share} or {tokens})",
        )
    elif "budget" not in eviction.value.consumes or not least_rows(apply):
        yield (
            ROLE,
            f"would change nothing: '{eviction.value.name}' as applied reads no budget; "
            "apply an eviction that does, or leave budgets out",
        )
    own, other = _kv_layers(around.parents["of"]), _kv_layers(parent.parents["of"])
    if own != other:
        yield (
            ROLE,
            f"'{parent.name}' has budgets for {other} layers that own keys and values, "
            f"'{around.parents['of'].name}' has {own}",
        )


def _kv_layers(parent: Parent) -> int:
    config, method = lineage(parent)
    return len(method_of(method).acting(config).kv_layers)
