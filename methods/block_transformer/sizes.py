"""The sizes of the two decoders and of what joins them, from a decoder config. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kvlab.methods.axis import MethodError
from kvlab.methods.block_transformer.params import BlockTransformerParams
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """A Block Transformer's sizes.

    Attributes:
        block, token: the two decoders. The block decoder has no vocabulary tables.
        embedder: resolved kind; embedding_width: of a row of its table.
        vectors: what a context vector is expanded to (p, or L_B).
        rows: most rows the token decoder ever sees (keys of one block).
    """

    block: DecoderConfig
    token: DecoderConfig
    embedder: str
    embedding_width: int
    vectors: int
    rows: int


def sizes(config: DecoderConfig, params: BlockTransformerParams) -> Sizes:
    """Return the sizes that a decoder of `config` has as a Block Transformer.

    With `layers: split` and no explicit counts the two bodies together have exactly the layers of
    `config`, so that body parameters are equal but for embedder and expansion.

    Raises:
        MethodError: sizes that cannot be split.
    """
    length = params.block_length
    kind = _embedder(config, params)
    prefix = params.token_decoder == "prefix"
    vectors = params.prefix_length if prefix else length
    rows = params.prefix_length + length - 1 if prefix else length
    block_layers, token_layers = _layers(config.layers, params)
    windows = config.windows and tuple(
        None if w is None else max(1, -(-w // length)) for w in config.windows
    )
    block = config.with_(
        layers=block_layers,
        windows=windows and _of_block(windows, block_layers, _stride(params)),
        max_positions=-(-config.max_positions // length),
    )
    token = config.with_(layers=token_layers, windows=None, max_positions=rows)
    if params.token_width is not None:
        token = _resize(token, params.token_width, params.token_heads)
    if params.expansion == "repeat" and token.width != config.width:
        raise MethodError(
            f"expansion 'repeat' needs decoders of one width, found {config.width} and "
            f"{token.width}: use 'linear'"
        )
    return Sizes(block, token, kind, _embedding_width(config, params, kind), vectors, rows)


def origins(layers: int, params: BlockTransformerParams) -> tuple[list[int], list[int]]:
    """Return which of a parent's layers the block and the token decoder take, in order.

    Raises:
        MethodError: explicit counts that do not add up to the parent's layers.
    """
    block, token = _layers(layers, params)
    if params.layers == "split":
        if block + token != layers:
            raise MethodError(
                f"block_layers {block} and token_layers {token} must add up to the parent's "
                f"{layers} layers"
            )
        return list(range(block)), list(range(block, layers))
    taken = list(range(0, layers, _stride(params)))
    return taken, taken


def _layers(layers: int, params: BlockTransformerParams) -> tuple[int, int]:
    if params.layers != "split":
        count = layers if params.layers == "duplicate" else -(-layers // 2)
        return count, count
    block, token = params.block_layers, params.token_layers
    if block is None and token is None:
        share = params.ratio / (1 + params.ratio)
        block = min(max(1, round(layers * share)), layers - 1)
    if block is None:
        block = layers - (token or 0)
    if token is None:
        token = layers - block
    if block < 1 or token < 1:
        raise MethodError(
            f"{layers} layers cannot be split into {block} for blocks and {token} for tokens: each "
            "decoder needs one"
        )
    return block, token


def _stride(params: BlockTransformerParams) -> int:
    """From one layer that the block decoder takes to the next."""
    return 2 if params.layers == "skip" else 1


def _of_block(windows: tuple[int | None, ...], layers: int, stride: int) -> tuple[int | None, ...]:
    """The window of each layer taken; a taller block decoder begins again at the first."""
    return tuple(windows[i * stride % len(windows)] for i in range(layers))


def _resize(token: DecoderConfig, width: int, heads: int | None) -> DecoderConfig:
    group = token.heads // token.kv_heads
    heads = heads or width // token.head_dim
    head_dim = width // heads if heads else 0
    if head_dim * heads != width or heads % group:
        raise MethodError(
            f"token_width {width} is no whole number of heads: use a multiple of "
            f"{token.head_dim * group}, or give token_heads"
        )
    return token.with_(
        width=width,
        heads=heads,
        kv_heads=heads // group,
        head_dim=head_dim,
        ffn_width=max(1, token.ffn_width * width // token.width),
    )


def _embedder(config: DecoderConfig, params: BlockTransformerParams) -> str:
    divides = config.width % params.block_length == 0
    if params.embedder == "auto":
        return "lookup" if divides else "projection"
    if params.embedder == "lookup" and not divides:
        raise MethodError(
            f"block_length {params.block_length} does not divide the width {config.width}, as "
            "embedder 'lookup' needs: use 'projection'"
        )
    return params.embedder


def _embedding_width(config: DecoderConfig, params: BlockTransformerParams, kind: str) -> int:
    if kind == "lookup":
        return config.width // params.block_length
    if kind == "projection":
        return params.embedding_width or config.width
    return params.encoder_width
