"""Reference checkpoints: other sizes than the golden ones, and what is refused by name."""

import re

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.block_transformer.reference import from_reference

VOCABULARY, LENGTH = 31, 4


def layer(width: int) -> dict[str, tuple[int, ...]]:
    maps = {
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (4 * width, width),
        "mlp.dense_4h_to_h": (width, 4 * width),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    weights = {f"{name}.weight": shape for name, shape in maps.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in maps.items()}


def checkpoint(width: int = 64, token_width: int = 64, vectors: int = 2) -> dict[str, Tensor]:
    """A state dict with the reference's names and shapes: 2 block layers, 1 token layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedder.embeddings.weight": (VOCABULARY, width // LENGTH),
        "block_decoder.gpt_neox.embed_in.weight": (VOCABULARY, width),
        "token_decoder.gpt_neox.embed_in.weight": (VOCABULARY, token_width),
        "token_decoder.embed_out.weight": (VOCABULARY, token_width),
        "token_decoder.expansion_layer.weight": (token_width * vectors, width, 1),
        "token_decoder.expansion_layer.bias": (token_width * vectors,),
    }
    for part, size, layers in (("block", width, 2), ("token", token_width, 1)):
        shapes[f"{part}_decoder.gpt_neox.final_layer_norm.weight"] = (size,)
        shapes[f"{part}_decoder.gpt_neox.final_layer_norm.bias"] = (size,)
        for i in range(layers):
            for name, shape in layer(size).items():
                shapes[f"{part}_decoder.gpt_neox.layers.{i}.{name}"] = shape
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_sizes_are_read_from_the_tensors() -> None:
    model = from_reference(checkpoint())
    assert (model.sizes.block.layers, model.sizes.token.layers) == (2, 1)
    assert (model.sizes.block.heads, model.sizes.block.head_dim) == (2, 32)
    assert (model.params.block_length, model.params.prefix_length) == (4, 2)
    assert model(torch.randint(VOCABULARY, (1, 12))).nll.isfinite().all()


def test_a_narrower_token_decoder_with_summation() -> None:
    """MEGABYTE's shape, as the reference re-implements it."""
    state = checkpoint(width=128, token_width=64, vectors=LENGTH)
    model = from_reference(state, heads=2, token_decoder="summation")
    assert (model.sizes.block.head_dim, model.sizes.token.head_dim) == (64, 32)
    assert model(torch.randint(VOCABULARY, (1, 12))).nll.isfinite().all()


def test_buffers_of_older_versions_are_ignored() -> None:
    state = checkpoint()
    prefix = "token_decoder.gpt_neox.layers.0.attention"
    state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(4)
    state[f"{prefix}.masked_bias"] = torch.ones(())
    from_reference(state)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("token_decoder.embed_out.weight", "token_decoder.decoder.output.weight"),
        ("token_decoder.expansion_layer.weight", "token_decoder.expansion_layer.weight"),
        ("embedder.embeddings.weight", "embedder.embeddings.weight"),
        (
            "block_decoder.gpt_neox.layers.1.mlp.dense_h_to_4h.bias",
            "block_decoder.layers.1.mlp.up.bias",
        ),
    ],
)
def test_a_missing_tensor_is_named(missing: str, named: str) -> None:
    state = checkpoint()
    del state[missing]
    with pytest.raises(KvlabError, match=re.escape(named)):
        from_reference(state)


def test_a_tensor_of_another_shape_is_named() -> None:
    state = checkpoint() | {"token_decoder.embed_out.weight": torch.zeros(VOCABULARY, 8)}
    with pytest.raises(
        KvlabError, match=r"another shape, .*: token_decoder\.decoder\.output\.weight"
    ):
        from_reference(state)


def test_other_variants_are_refused_by_name() -> None:
    state = checkpoint() | {"embedder.encoder.layer.0.output.dense.weight": torch.zeros(2, 2)}
    with pytest.raises(KvlabError, match=r"not imported: .*embedder\.encoder\.layer\.0"):
        from_reference(state)
    with pytest.raises(KvlabError, match="not a lookup model of the reference"):
        from_reference({})


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(KvlabError, match="give the checkpoint's own numbers of heads"):
        from_reference(checkpoint(), heads=5)
    state = checkpoint() | {"embedder.embeddings.weight": torch.zeros(VOCABULARY, 24)}
    with pytest.raises(KvlabError, match="no projection"):
        from_reference(state)
