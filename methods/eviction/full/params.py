"""Full attention: nothing is evicted."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import Value
from kvlab.methods.cache.sources import BY_NUMBER


@dataclass(frozen=True, slots=True)
class FullParams:
    """Full attention has no settings."""


ENTRY = Value(
    axis="eviction",
    name="full_attention",
    summary="every past token stays (the baseline)",
    params=FullParams,
    implementation="kvlab.methods.eviction.full.policy:FullPolicy",
    cost="kvlab.methods.eviction.full.cost",
    default=True,
    consumes=("precision",),
    served=lambda params: "paged",
    sources=("kvlab.methods.eviction.full", *BY_NUMBER),
)
