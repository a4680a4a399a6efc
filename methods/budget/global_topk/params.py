"""One top-k over all layers and tokens: layers keep what scores highest anywhere (ours)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvlab.methods.axis import Method, Value
from kvlab.methods.budget import amount
from kvlab.methods.budget.amount import Amount
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class GlobalTopKParams(Amount):
    """See `Amount`: the average over the layers."""


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with it for the method's eviction."""
    yield from amount.composes(method, config)
    eviction = method["eviction"].value
    if not eviction.scores:
        yield (
            f"{eviction.name} gives tokens no score that layers could compare: choose one that "
            "does (h2o, snapkv, observed_attention)"
        )


ENTRY = Value(
    axis="budget",
    name="global_topk",
    summary="the highest scores of all layers' tokens stay, wherever they are",
    params=GlobalTopKParams,
    implementation="kvlab.methods.budget.global_topk.budget:GlobalTopK",
    cost="kvlab.methods.budget.uniform.cost",
    composes=composes,
    observes_all=True,
    sources=("kvlab.methods.budget",),
)
