"""Uniform budget: every layer keeps as many rows."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import Value
from kvlab.methods.budget.amount import Amount, composes


@dataclass(frozen=True, slots=True)
class UniformParams(Amount):
    """See `Amount`."""


ENTRY = Value(
    axis="budget",
    name="uniform",
    summary="every layer keeps as many rows (the baseline)",
    params=UniformParams,
    implementation="kvlab.methods.budget.uniform.budget:Uniform",
    cost="kvlab.methods.budget.uniform.cost",
    default=True,
    composes=composes,
    sources=("kvlab.methods.budget.amount", "kvlab.methods.budget.uniform"),
)
