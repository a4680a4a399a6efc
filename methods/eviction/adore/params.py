"""ADORE: a controller releases tokens, and has those rebuilt that matter again (2407.02328)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.cache.sources import BY_RANK
from kvlab.methods.decoder.config import DecoderConfig

Per = Literal["model", "layer"]


@dataclass(frozen=True, slots=True)
class AdoreParams:
    """The budget is m, the past rows that each layer keeps.

    Attributes:
        rebuild: R, released tokens that go through all layers again beside the current one.
        context: tokens before each rebuilt one that are rebuilt with it, inside R: what a token's
            keys say comes most of all from its neighbours.
        scores: who says how much a token matters now: a trained "controller", or a "rule" without
            training: the attention that the token has received from all layers and heads so far.
        controller: the folder of a trained controller; a workflow's `controller:` fills it in.
        per: tokens are released by the whole "model" or by each KV "layer" for itself, by scores of
            its own.
        recent: the newest past rows, which are not released.
        readmit: rebuilt tokens may take the place of kept ones; else one that was released is only
            ever rebuilt, for a step.
        every: steps from one rebuild to the next.
        threshold: only tokens whose score, from 0 to 1, is above are rebuilt.
        refresh: steps from one scoring of released tokens to the next.
        source: "recompute" what was released; or "offload": its keys and values are kept in host
            memory and fetched.
    """

    rebuild: Annotated[int, Range(0, 256)] = 8
    context: Annotated[int, Range(0, 255)] = 0
    scores: Literal["controller", "rule"] = "controller"
    controller: str = ""
    per: Per = "model"
    recent: Annotated[int, Range(1, 4096, log=True)] = 4
    readmit: bool = False
    every: Annotated[int, Range(1, 4096, log=True)] = 1
    threshold: Annotated[float, Range(0.0, 1.0)] | None = None
    refresh: Annotated[int, Range(1, 4096, log=True)] = 1
    source: Literal["recompute", "offload"] = "recompute"


def check(params: AdoreParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible."""
    if params.scores == "rule" and params.controller:
        yield "controller: scores is 'rule', which has none: leave one of the two out"
    if params.scores == "rule" and params.threshold is not None:
        yield "threshold: attention received is no probability: use scores: controller"
    if params.rebuild and params.context >= params.rebuild:
        yield (
            f"context: must be below rebuild ({params.rebuild}), which counts these tokens too, "
            f"found {params.context}"
        )
    if not params.rebuild and (
        params.readmit or params.context or params.every > 1 or params.threshold is not None
    ):
        yield "rebuild: is 0, so readmit, context, every and threshold change nothing"


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what it cannot be combined with."""
    granularity = method.choices.get("granularity")
    if granularity is not None and granularity.value.span is not None:
        yield f"releases tokens, and '{granularity.value.name}' keeps blocks"
    if config is None or config.sharing is None:
        return
    if config.sharing.strict or config.upward:
        yield (
            "rebuilds a token together with the current one, which layers that read keys from "
            "above them cannot: share downwards (a bottom layout)"
        )


ENTRY = Value(
    axis="eviction",
    name="adore",
    summary="a learned controller keeps m tokens and has R released ones rebuilt at each step",
    params=AdoreParams,
    implementation="kvlab.methods.eviction.adore.ranking:Adore",
    cost="kvlab.methods.eviction.adore.cost",
    paper="2407.02328",
    consumes=("budget", "precision"),
    check=check,
    composes=composes,
    least=lambda params: params.recent + 1,
    needs=lambda params: (
        "controller" if params.scores == "controller" and not params.controller else None
    ),
    served=lambda params: "slots",
    observes_all=True,  # attention received does; a controller would not
    sources=("kvlab.methods.eviction.adore", *BY_RANK),
)
