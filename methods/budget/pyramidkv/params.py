"""PyramidKV: an arithmetic sequence of budgets, most at the bottom (arXiv 2406.02069)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.budget import amount
from kvlab.methods.budget.amount import Amount
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class PyramidParams(Amount):
    """See `Amount`.

    Attributes:
        beta: the top layer keeps 1/beta of the average.
        rule: "conserve": window inside the count, rounded so that the total is exact. "paper": the
            repository's, whose floored step keeps more than it was given. "kvpress": that of
            kvpress 0.5.5, which falls back to uniform budgets where the top would lose its window.
    """

    beta: Annotated[int, Range(1, 1000, log=True)] = 20
    rule: Literal["conserve", "paper", "kvpress"] = "conserve"


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with it for the method's eviction."""
    yield from amount.composes(method, config)


ENTRY = Value(
    axis="budget",
    name="pyramidkv",
    summary="budgets fall from the bottom layer to the top, 1/beta of the average",
    params=PyramidParams,
    implementation="kvlab.methods.budget.pyramidkv.budget:Pyramid",
    cost="kvlab.methods.budget.pyramidkv.cost",
    paper="2406.02069",
    composes=composes,
    sources=("kvlab.methods.budget.amount", "kvlab.methods.budget.pyramidkv"),
)
