"""Sliding window: only the newest tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.cache.sources import BY_NUMBER, BY_RANK
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class SlidingWindowParams:
    """Attributes:
    window: tokens a query may read, its own included; a prompt is read through it, too. None: the
        budget says how many past ones each layer keeps, and a prompt is read in full, then cut.
    """

    window: Annotated[int, Range(1, 1048576, log=True)] | None = None


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with it beside the method's budget."""
    window, budget = method["eviction"].params.window, method["budget"]
    if window is not None and not budget.is_default:
        yield (
            f"window: {window} says how many rows every layer keeps, and so does "
            f"'{budget.value.name}': give one of the two"
        )


ENTRY = Value(
    axis="eviction",
    name="sliding_window",
    summary="only the newest tokens stay: the last `window`, or as many as the budget says",
    params=SlidingWindowParams,
    implementation="kvlab.methods.eviction.sliding_window.policy:SlidingWindow",
    cost="kvlab.methods.eviction.sliding_window.cost",
    consumes=("budget", "precision"),
    composes=composes,
    least=lambda params: 1 if params.window is None else 0,
    served=lambda params: "slots" if params.window is None else "paged",
    sources=("kvlab.methods.eviction.sliding_window", *BY_NUMBER, *BY_RANK),
)
