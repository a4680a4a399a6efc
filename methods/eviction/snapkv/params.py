"""SnapKV: the end of a prompt votes which of its tokens stay (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Range, Value
from kvlab.methods.cache.sources import BY_RANK
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class SnapKVParams:
    """A prompt is cut once; what is generated stays.

    Attributes:
        window: the last prompt tokens: they vote, and always stay, inside the budget.
        kernel: width of the pooling over neighbouring tokens; odd.
        pooling: "average" (kvpress, the class of the paper's repository) or "max" (its LongBench
            settings).
        heads: who keeps rows of its own: each "kv" head, or each "query" head (the paper's
            repository; the cache then grows by the size of a group).
        votes: pool the "mean" of a group's votes, or take the mean of its "pooled" votes (kvpress);
            with average pooling there is no difference.
    """

    window: Annotated[int, Range(1, 4096, log=True)] = 32
    kernel: Annotated[int, Range(1, 255)] = 5
    pooling: Literal["average", "max"] = "average"
    heads: Literal["kv", "query"] = "kv"
    votes: Literal["mean", "pooled"] = "mean"


def check(params: SnapKVParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible."""
    if params.kernel % 2 == 0:
        yield f"kernel: must be odd, found {params.kernel}: an even one has no middle"


ENTRY = Value(
    axis="eviction",
    name="snapkv",
    summary="the tokens that the end of the prompt attends to stay, and all that is generated",
    params=SnapKVParams,
    implementation="kvlab.methods.eviction.snapkv.ranking:SnapKV",
    cost="kvlab.methods.eviction.snapkv.cost",
    paper="2404.14469",
    consumes=("budget", "precision"),
    grows=lambda params: True,
    check=check,
    least=lambda params: params.window + 1,
    scores=True,
    observes_all=True,
    served=lambda params: "slots",
    sources=("kvlab.methods.eviction.snapkv", *BY_RANK),
)
