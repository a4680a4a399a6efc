"""Uptraining: what a converted model takes over from its parent, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.build import build, convert
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve


@pytest.fixture
def parent(config: DecoderConfig) -> TokenModel:
    torch.manual_seed(3)
    model = build(config, resolve({}))
    assert isinstance(model, TokenModel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def converted(parent: TokenModel, **params: object) -> BlockTransformer:
    model = convert(parent, resolve({"block_transformer": {"block_length": 4, **params}}))
    assert isinstance(model, BlockTransformer)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


def test_layers_are_divided_and_tables_taken(parent: TokenModel) -> None:
    model, source = converted(parent), parent.decoder
    inner = model.token_decoder.decoder
    assert [same(a, b) for a, b in zip(model.block_decoder.layers, source.layers[:2], strict=True)]
    assert all(same(a, b) for a, b in zip(inner.layers, source.layers[2:], strict=True))
    assert same(inner.norm, source.norm)
    assert same(inner.embedding, source.embedding)
    assert (inner.output is None) == parent.config.tie_embeddings
    assert not same(model.block_decoder.norm, source.norm)


def test_a_block_starts_as_the_mean_of_its_tokens(
    parent: TokenModel, ids: Callable[..., Tensor]
) -> None:
    model, blocks = converted(parent), ids(3, 2, 4)
    with torch.no_grad():
        mean = parent.decoder.embed(blocks.flatten(0, 1)).mean(1).unflatten(0, (3, 2))
        torch.testing.assert_close(model.embedder(blocks), mean)
        context = torch.randn(3, 40)
        vectors = model.token_decoder.expansion(context)
    assert torch.equal(vectors, context[:, None].expand(3, 2, 40))


@pytest.mark.parametrize(
    ("layers", "origin"), [("skip", ([0, 2], [0, 2])), ("duplicate", ([0, 1, 2, 3],) * 2)]
)
def test_skip_and_duplicate(
    parent: TokenModel, layers: str, origin: tuple[list[int], list[int]]
) -> None:
    model = converted(parent, layers=layers)
    for decoder, taken in zip(
        (model.block_decoder, model.token_decoder.decoder), origin, strict=True
    ):
        sources = [parent.decoder.layers[i] for i in taken]
        assert all(same(a, b) for a, b in zip(decoder.layers, sources, strict=True))


def test_uneven_counts(parent: TokenModel) -> None:
    model = converted(parent, block_layers=3)
    assert (len(model.block_decoder.layers), len(model.token_decoder.decoder.layers)) == (3, 1)
    with pytest.raises(KvlabError, match="must add up to the parent's 4 layers"):
        converted(parent, block_layers=3, token_layers=3)


@pytest.mark.parametrize("block_length", [3, 7])
def test_any_block_length_and_its_predicted_size(parent: TokenModel, block_length: int) -> None:
    """Blocks that do not divide the width are fine: the projection embedder is the default here."""
    method = resolve({"block_transformer": {"block_length": block_length}})
    model = convert(parent, method)
    assert model.method.to_dict() == method.uptrained().to_dict()
    assert cost_of(parent.config, method.uptrained()).body_parameters() == model.body_parameters()


def test_cross_attention_adds_nothing_at_first(
    parent: TokenModel, ids: Callable[..., Tensor]
) -> None:
    model = converted(parent, token_decoder="cross_attention")
    blocks = ids(2, 4)
    with torch.no_grad():
        hidden = model.token_decoder(torch.randn(2, 40), blocks, None)
        shifted = torch.cat([torch.zeros(2, 1, dtype=torch.long), blocks[:, :3]], dim=1)
        plain = model.token_decoder.decoder.body(parent.decoder.embed(shifted))
    torch.testing.assert_close(hidden, plain)


def test_a_random_start_is_possible_for_every_embedder(parent: TokenModel) -> None:
    for embedder in ("lookup", "encoder", "cls"):
        with pytest.raises(KvlabError, match="uptrain_embedder: random"):
            converted(parent, embedder=embedder)
        model = converted(parent, embedder=embedder, uptrain_embedder="random")
        assert model.sizes.embedder == embedder


def test_other_sizes_are_refused(parent: TokenModel) -> None:
    with pytest.raises(KvlabError, match="use 'projection' of width 40"):
        converted(parent, embedding_width=32)
    with pytest.raises(KvlabError, match="not the parent's width 40"):
        converted(parent, token_width=32)


def test_a_block_model_goes_on_as_itself_only(parent: TokenModel) -> None:
    model = converted(parent)
    again = convert(model, model.method)
    assert same(again, model)
    with pytest.raises(KvlabError, match="uptrain from the decoder it came from"):
        convert(model, resolve({"block_transformer": {"block_length": 2}}))
    with pytest.raises(KvlabError, match="back to tokens"):
        convert(model, resolve({}))
