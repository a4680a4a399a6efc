"""SqueezeAttention: layers that change the stream little keep fewer rows (arXiv 2404.04793)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.budget import amount
from kvlab.methods.budget.amount import Amount
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class SqueezeParams(Amount):
    """See `Amount`; the paper measures cosines once, in the prompt, and sets p by hand.

    Attributes:
        p: rows of the least important group of layers, as a share of the average. None: found for
            each prompt from its own importances (ours; see the README).
        importance: "cosine", of the residual stream before and after attention (the paper's); or
            "mass", how widely a layer's attention is spread (ours).
        refresh: measure again, and divide anew, every so many steps. None: never (the paper).
        per: one division for each "sample", or one for the whole "batch" (the mean of its tokens).
        rounding: "conserve" the total exactly, no layer below what its eviction needs; "truncate"
            as the reference does, which loses up to a row a layer.
    """

    p: Annotated[float, Range(0.01, 1.0)] | None = 0.35
    importance: Literal["cosine", "mass"] = "cosine"
    refresh: Annotated[int, Range(1, 2**20, log=True)] | None = None
    per: Literal["sample", "batch"] = "sample"
    rounding: Literal["conserve", "truncate"] = "conserve"


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with it for the method's eviction."""
    yield from amount.composes(method, config)
    eviction = method["eviction"]
    grows = eviction.value.grows is not None and eviction.value.grows(eviction.params)
    if method["budget"].params.refresh is not None and grows:
        yield (
            f"refresh: {eviction.value.name} evicts nothing after the prompt, so that nothing can "
            "be divided anew: leave it out"
        )


ENTRY = Value(
    axis="budget",
    name="squeeze_attention",
    summary="unimportant layers keep p of the average, the others share the rest",
    params=SqueezeParams,
    implementation="kvlab.methods.budget.squeeze_attention.budget:SqueezeAttention",
    cost="kvlab.methods.budget.uniform.cost",
    paper="2404.04793",
    composes=composes,
    observes_all=True,
    sources=("kvlab.methods.budget",),
)
