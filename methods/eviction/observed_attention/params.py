"""Observed attention: the mean attention a prompt token got decides (kvpress)."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import Value
from kvlab.methods.cache.sources import BY_RANK


@dataclass(frozen=True, slots=True)
class ObservedAttentionParams:
    """A prompt is cut once, without a window; what is generated stays. No settings."""


ENTRY = Value(
    axis="eviction",
    name="observed_attention",
    summary="the prompt tokens with the most attention per query stay, and all that is generated",
    params=ObservedAttentionParams,
    implementation="kvlab.methods.eviction.observed_attention.ranking:ObservedAttention",
    cost="kvlab.methods.eviction.observed_attention.cost",
    consumes=("budget", "precision"),
    grows=lambda params: True,
    scores=True,
    observes_all=True,
    served=lambda params: "slots",
    sources=("kvlab.methods.eviction.observed_attention", *BY_RANK),
)
