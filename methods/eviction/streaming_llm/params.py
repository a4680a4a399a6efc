"""StreamingLLM: the first tokens and the newest stay (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Range, Value
from kvlab.methods.cache.sources import BY_RANK


@dataclass(frozen=True, slots=True)
class StreamingParams:
    """Attributes:
    sinks: of the first tokens that always stay, inside the budget.
    positions: "cache": keys stand where they lie in the cache (the paper's); "absolute": where
        they stood in the text.
    generated: "evict": old rows leave as new ones come; "keep": only a prompt is cut.
    turns: make room before a turn (its tokens and those to be generated), evict nothing in it.
    """

    sinks: Annotated[int, Range(0, 4096)] = 4
    positions: Literal["cache", "absolute"] = "cache"
    generated: Literal["evict", "keep"] = "evict"
    turns: bool = False


ENTRY = Value(
    axis="eviction",
    name="streaming_llm",
    summary="the first `sinks` tokens and the newest stay",
    params=StreamingParams,
    implementation="kvlab.methods.eviction.streaming_llm.ranking:StreamingLLM",
    cost="kvlab.methods.eviction.streaming_llm.cost",
    paper="2309.17453",
    consumes=("budget", "precision"),
    grows=lambda params: params.generated == "keep",
    least=lambda params: params.sinks + 1,
    served=lambda params: "slots",
    sources=("kvlab.methods.eviction.streaming_llm", *BY_RANK),
)
