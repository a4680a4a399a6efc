"""H2O: heavy hitters and the newest tokens stay, for each KV head (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Range, Value
from kvlab.methods.cache.sources import BY_RANK


@dataclass(frozen=True, slots=True)
class H2OParams:
    """Attributes:
    recent: share of the budget that the newest tokens take; heavy hitters have the rest.
    positions: "absolute": keys stand where they stood in the text; "cache": where they lie in
        the cache (the reference's rolling variant).
    generated: "evict": a row leaves with every new one; "keep": only a prompt is cut.
    """

    recent: Annotated[float, Range(0.0, 1.0)] = 0.5
    positions: Literal["absolute", "cache"] = "absolute"
    generated: Literal["evict", "keep"] = "evict"


ENTRY = Value(
    axis="eviction",
    name="h2o",
    summary="the tokens with the most attention so far and the newest stay, for each KV head",
    params=H2OParams,
    implementation="kvlab.methods.eviction.h2o.ranking:H2O",
    cost="kvlab.methods.eviction.h2o.cost",
    paper="2306.14048",
    consumes=("budget", "precision"),
    grows=lambda params: params.generated == "keep",
    least=lambda params: 2,
    scores=True,
    observes_all=True,
    served=lambda params: "slots",
    sources=("kvlab.methods.eviction.h2o", *BY_RANK),
)
