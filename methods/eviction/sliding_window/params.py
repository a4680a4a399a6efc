"""Sliding window: only the newest tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kvlab.methods.axis import Range, Value


@dataclass(frozen=True, slots=True)
class SlidingWindowParams:
    """Attributes: window: tokens a query may read, its own included."""

    window: Annotated[int, Range(1, 1048576, log=True)] = 128


ENTRY = Value(
    axis="eviction",
    name="sliding_window",
    summary="only the last `window` tokens stay",
    params=SlidingWindowParams,
    implementation="kvlab.methods.eviction.sliding_window.policy:SlidingWindowPolicy",
    cost="kvlab.methods.eviction.sliding_window.cost",
    consumes=("precision",),
    sources=("kvlab.methods.eviction.sliding_window",),
)
