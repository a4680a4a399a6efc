"""From a trained decoder to a Block Transformer that starts from its weights (uptraining)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.block_transformer.cross_attention import CrossAttendingDecoder, CrossAttention
from kvlab.methods.block_transformer.embedder import ProjectionEmbedder
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.block_transformer.params import convertible
from kvlab.methods.block_transformer.sizes import origins
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.model import LanguageModel
from kvlab.methods.sharing.convert import Merge, merge_of, start_layers


def convert(parent: LanguageModel, method: Method) -> BlockTransformer:
    """Return a Block Transformer made of a parent's layers and tables.

    The embedder starts as the mean of the parent's token embeddings, the expansion as the identity
    for every vector, the token decoder with the parent's tables and final norm; the block
    decoder's final norm starts afresh, as in the reference (fact 3). What the parent has no
    counterpart of (encoders, cross-attention) is drawn at random; cross-attention adds nothing yet.
    `fresh` names every parameter whose values are not the parent's own.

    Raises:
        KvlabError: the parent is no decoder over tokens or has other sizes than asked.
    """
    if isinstance(parent, BlockTransformer):
        return _continue(parent, method)
    if not isinstance(parent, TokenModel):
        raise KvlabError(f"a {type(parent).__name__} cannot be converted to a Block Transformer")
    model = BlockTransformer(parent.config, method.uptrained())
    params, source = model.params, parent.decoder
    for problem in convertible(params, parent.config, source.config):
        raise KvlabError(problem)
    for_blocks, for_tokens = origins(parent.config.layers, params)
    with torch.no_grad():
        taken = [
            *_take_layers(model.block_decoder, source, for_blocks, merge_of(method)),
            *_take_layers(model.token_decoder.decoder, source, for_tokens),
            *_take_tables(model.token_decoder.decoder, source),
            *_start_embedder(model, source),
        ]
        _start_expansion(model)
    known = {id(parameter) for parameter in taken}
    model.fresh = frozenset(n for n, p in model.named_parameters() if id(p) not in known)
    return model


def _continue(parent: BlockTransformer, method: Method) -> BlockTransformer:
    model = BlockTransformer(parent.config, method.uptrained())
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in parent.state_dict().items()}
    if wanted != found or model.params.block_length != parent.params.block_length:
        raise KvlabError(
            "a Block Transformer cannot be converted to one of other sizes: uptrain from the "
            f"decoder it came from, or ask for its own ({parent.method.to_dict()['granularity']})"
        )
    model.load_state_dict(parent.state_dict())
    return model


def _take_layers(
    decoder: Decoder, source: Decoder, origin: Sequence[int], merge: Merge = "mean"
) -> Iterator[Tensor]:
    """Start layers as the source's; yield the parameters that hold its own values."""
    started = start_layers(decoder.config, source, origin, merge)
    decoder.layers.load_state_dict(started.tensors)
    for name, parameter in decoder.layers.named_parameters():
        if name not in started.merged:
            yield parameter


def _take_tables(decoder: Decoder, source: Decoder) -> Iterator[Tensor]:
    """Take over embeddings, final norm and head, tied tables tied; yield what was taken."""
    decoder.norm.load_state_dict(source.norm.state_dict())
    yield from decoder.norm.parameters()
    for mine, theirs in ((decoder.embedding, source.embedding), (decoder.output, source.output)):
        if mine is not None and theirs is not None:
            mine.weight.copy_(theirs.weight)
            yield mine.weight
    if isinstance(decoder, CrossAttendingDecoder):
        for cross in cast(Iterable[CrossAttention], decoder.cross):
            nn.init.zeros_(cross.out.weight)


def _start_embedder(model: BlockTransformer, source: Decoder) -> Iterator[Tensor]:
    """Start the embedder as a mean of the parent's embeddings; yield the table taken over."""
    if model.params.uptrain_embedder == "random":
        return
    embedder, width = model.embedder, model.config.width
    assert isinstance(embedder, ProjectionEmbedder)
    assert source.embedding is not None
    embedder.table.weight.copy_(source.embedding.weight)
    length = model.params.block_length
    embedder.projection.weight.copy_(torch.eye(width).repeat(1, length) / length)
    nn.init.zeros_(embedder.projection.bias)
    yield embedder.table.weight


def _start_expansion(model: BlockTransformer) -> None:
    linear = model.token_decoder.expansion.linear
    if linear is not None and model.params.uptrain_expansion == "identity":
        linear.weight.copy_(torch.eye(model.config.width).repeat(model.sizes.vectors, 1))
        nn.init.zeros_(linear.bias)
