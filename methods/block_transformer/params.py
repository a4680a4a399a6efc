"""What can be chosen about a Block Transformer, and its entry in the registry. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from kvlab.methods.axis import MethodError, Range, Value
from kvlab.methods.decoder.config import ConfigError, DecoderConfig
from kvlab.methods.sharing.values import unpoolable


@dataclass(frozen=True, slots=True)
class BlockTransformerParams:
    """A decoder of n layers becomes a decoder over blocks and a decoder inside a block.

    Attributes:
        block_length: L_B, tokens of a block.
        embedder: how L_B tokens become one vector. `lookup`: narrow rows concatenated;
            `projection`: rows of any width, then a linear layer; `encoder`, `cls`: a small
            bidirectional encoder inside the block. `auto`: `projection` when uptrained or when
            block_length does not divide the width, else `lookup`.
        embedding_width: width of a row of the `projection` table; None: the decoder's width.
        encoder_layers, encoder_width, cls_tokens: sizes of the small encoder.
        token_decoder: how the context vector reaches the token decoder.
        prefix_length: p, vectors in front of the tokens (`prefix` only).
        expansion: the context vector's way to those vectors: a `linear` layer each, or `repeat`.
        layers: which of the n layers go where. `split`: the first to the block decoder, the others
            to the token decoder; `skip`: every second one to both; `duplicate`: all to both.
        ratio: block decoder layers per token decoder layer (`split` only).
        block_layers, token_layers: explicit counts, instead of the ratio.
        token_width: the token decoder's width where it differs (as in MEGABYTE).
        token_heads: query heads of such a token decoder; None: heads keep their size.
        random_padding, pad_to_block_boundary: how documents are packed for training.
        uptrain_embedder: what an uptrained `projection` starts as: `mean` of the token embeddings.
        uptrain_expansion: what an uptrained `linear` expansion starts as: `identity`, stacked.
    """

    block_length: Annotated[int, Range(1, 64, log=True)] = 4
    embedder: Literal["auto", "lookup", "projection", "encoder", "cls"] = "auto"
    embedding_width: Annotated[int, Range(1, 16384, log=True)] | None = None
    encoder_layers: Annotated[int, Range(1, 12)] = 3
    encoder_width: Annotated[int, Range(8, 4096, log=True)] = 256
    cls_tokens: Annotated[int, Range(1, 16)] = 3
    token_decoder: Literal["prefix", "summation", "cross_attention"] = "prefix"
    prefix_length: Annotated[int, Range(1, 16)] = 2
    expansion: Literal["linear", "repeat"] = "linear"
    layers: Literal["split", "skip", "duplicate"] = "split"
    ratio: Annotated[float, Range(0.05, 20, log=True)] = 1.0
    block_layers: Annotated[int, Range(1, 512)] | None = None
    token_layers: Annotated[int, Range(1, 512)] | None = None
    token_width: Annotated[int, Range(8, 65536, log=True)] | None = None
    token_heads: Annotated[int, Range(1, 512)] | None = None
    random_padding: bool = True
    pad_to_block_boundary: bool = True
    uptrain_embedder: Literal["mean", "random"] = "mean"
    uptrain_expansion: Literal["identity", "random"] = "identity"


def uptrained(params: BlockTransformerParams) -> BlockTransformerParams:
    """Return the params as a model converted from a checkpoint has them."""
    return replace(params, embedder="projection") if params.embedder == "auto" else params


def check(params: BlockTransformerParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible, for `config` where it is known."""
    if params.layers != "split" and (params.block_layers or params.token_layers):
        yield f"block_layers, token_layers: set by layers '{params.layers}'; leave them out"
    if params.token_heads is not None and params.token_width is None:
        yield "token_heads: only beside token_width; leave it out"
    if config is None:
        return
    from kvlab.methods.block_transformer.sizes import sizes

    try:
        sizes(config, params)
    except (MethodError, ConfigError) as error:
        yield str(error)


def convertible(
    params: BlockTransformerParams, config: DecoderConfig, parent: DecoderConfig
) -> Iterator[str]:
    """Yield what keeps a decoder from being converted to these (uptrained) params.

    Args:
        params: of the model it would become.
        config: sizes of the whole.
        parent: those of the decoder with its keys and values as they are.
    """
    from kvlab.methods.block_transformer.sizes import origins, sizes

    if params.token_width not in (None, config.width):
        yield (
            f"token_width {params.token_width} is not the parent's width {config.width}: "
            "leave it out when uptraining"
        )
    try:
        origins(config.layers, params)
        found = sizes(config, params)
    except (MethodError, ConfigError) as error:
        yield str(error)
        return
    yield from unpoolable(found.token, parent)
    projects = found.embedder == "projection" and found.embedding_width == config.width
    if params.uptrain_embedder == "mean" and not projects:
        yield (
            f"embedder '{found.embedder}' of width {found.embedding_width} cannot start as the "
            f"mean of the parent's embeddings: use 'projection' of width {config.width}, or "
            "uptrain_embedder: random"
        )


def inner(params: BlockTransformerParams, config: DecoderConfig) -> DecoderConfig:
    """Return the sizes of the block decoder, whose past the other axes shape."""
    from kvlab.methods.block_transformer.sizes import sizes

    return sizes(config, params).block


_MODULES = (
    "convert", "cost", "cross_attention", "embedder", "model", "packing", "params", "rows",
    "session", "sizes", "token_decoder",
)  # fmt: skip
"""All but what serves it, which stands with the server's own sources."""

ENTRY = Value(
    axis="granularity",
    name="block_transformer",
    summary="A global decoder over blocks of tokens and a local one inside each block",
    params=BlockTransformerParams,
    implementation="kvlab.methods.block_transformer.model:BlockTransformer",
    cost="kvlab.methods.block_transformer.cost",
    paper="2406.02657",
    check=check,
    uptrained=uptrained,
    convertible=convertible,
    span=lambda params: params.block_length,
    inner=inner,
    consumes=("sharing", "prefill"),
    sources=(
        *(f"kvlab.methods.block_transformer.{name}" for name in _MODULES),
        "kvlab.methods.packing",
        "kvlab.kernels",
    ),
)
