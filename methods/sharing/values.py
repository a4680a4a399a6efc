"""The values of the sharing axis, and what keeps a decoder from having them. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab import KvlabError
from kvlab.methods.axis import Value
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.sharing.params import (
    ClaParams,
    CrossLayerParams,
    GqaParams,
    LckvParams,
    OwnParams,
    SharingParams,
    YocoParams,
)


def shape(params: SharingParams, config: DecoderConfig) -> DecoderConfig:
    """Return the decoder with its keys and values shared; raise a MethodError if it cannot."""
    return params.shape(config)


def check(params: SharingParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible, for `config` where it is known."""
    problems = list(params.problems())
    yield from problems
    if config is None or problems:
        return
    try:
        params.shape(config)
    except KvlabError as error:
        yield str(error)


def convertible(
    params: SharingParams, config: DecoderConfig, parent: DecoderConfig
) -> Iterator[str]:
    """Yield what keeps the keys and values of a parent from becoming those of these params."""
    try:
        shaped = params.shape(config)
    except KvlabError:
        return  # `check` says it
    yield from unpoolable(shaped, parent)


def unpoolable(config: DecoderConfig, parent: DecoderConfig) -> Iterator[str]:
    """Yield what keeps the parent's key/value heads from becoming those of a decoder."""
    if parent.kv_heads % config.kv_heads:
        yield (
            f"the parent has {parent.kv_heads} key/value heads, which cannot be pooled into "
            f"{config.kv_heads}: choose a sharing whose kv_heads divide them, or another parent"
        )


def _sharing(name: str, summary: str, params: type[SharingParams], paper: str) -> Value:
    return Value(
        axis="sharing",
        name=name,
        summary=summary,
        params=params,
        paper=paper,
        check=check,
        convertible=convertible,
        shape=shape,
        sources=("kvlab.methods.sharing",),
    )


ENTRIES = (
    Value(
        axis="sharing",
        name="own",
        summary="every layer reads its own keys and values",
        params=OwnParams,
        default=True,
        convertible=convertible,
    ),
    _sharing(
        "cross_layer",
        "layers share keys and values by one of nine layouts, or by any map",
        CrossLayerParams,
        "2410.14442",
    ),
    _sharing(
        "lckv",
        "all but the warm-up layers read the keys and values of the top one of them",
        LckvParams,
        "2405.10637",
    ),
    _sharing(
        "cla",
        "neighbouring layers share the keys and values of the lowest of them",
        ClaParams,
        "2405.12981",
    ),
    _sharing(
        "yoco",
        "windows in the lower half, one layer's keys and values for the upper half",
        YocoParams,
        "2405.05254",
    ),
    _sharing("gqa", "fewer key/value heads in every layer", GqaParams, "2305.13245"),
)
