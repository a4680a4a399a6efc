"""A method that shares keys builds what its map says, inside a block decoder too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, Sharing, gpt_neox, llama
from kvlab.methods.decoder.generation import generate
from kvlab.methods.registry import resolve

Ids = Callable[..., Tensor]

SIZES = {
    "neox": gpt_neox(40, 8, 5),
    "llama": llama(40, 8, 10, 5, 96, head_dim=8, tie_embeddings=True),
}


@pytest.mark.parametrize("family_name", SIZES)
@pytest.mark.parametrize(
    "layers", [(0, 1, 1, 1), (3, 3, 3, 3), (0, 2, 2, 3), (1, 1, 3, 3)], ids=str
)
def test_sharing_inside_a_block_decoder(
    ids: Ids, family_name: str, layers: tuple[int, ...]
) -> None:
    """Generation is the parallel pass, as many passes as the prompts have blocks and more."""
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=53, init_std=0.3, **SIZES[family_name])
    model = (
        build(config, resolve({"cross_layer": {"layers": layers}, "block_transformer": {}}))
        .eval()
        .double()
    )
    assert isinstance(model, BlockTransformer)
    assert model.block_decoder.config.kv_of == layers
    assert model.token_decoder.decoder.config.sharing is None
    prompts = [ids(n).tolist() for n in (1, 13, 4, 18)]
    greedy = generate(model, prompts, 9)
    assert greedy == [generate(model, [prompt], 9)[0] for prompt in prompts]
    for prompt, new in zip(prompts, greedy, strict=True):
        pads = -len(prompt) % 4
        row = torch.tensor([[0] * pads + prompt + new])
        with torch.no_grad():
            parallel = model.logits(row, torch.arange(row.shape[1])[None] >= pads)
        first = pads + len(prompt) - 4
        assert parallel.flatten(1, 2)[0, first : first + 9].argmax(-1).tolist() == new
    session = model.start(ids(2, 16), new_tokens=8)
    c = model.block_decoder.config
    row_bytes = 2 * c.kv_heads * c.head_dim * 8
    blocks = 6 * (len(set(layers)) * row_bytes + 8)
    assert session.kv_bytes() - model.token_decoder.open(2).nbytes() == 2 * blocks


def test_a_method_builds_the_same_decoder(ids: Ids) -> None:
    """A map written as a method and one written into the config are the same model."""
    config = DecoderConfig(vocab_size=53, init_std=0.3, **llama(32, 6, 4, 2, 48))
    kv_of = (0, 4, 4, 4, 4, 5)
    for params in ({"layers": kv_of}, {"layout": "sandwich_top", "kv_layers": 3}):
        torch.manual_seed(0)
        by_method = build(config, resolve({"cross_layer": params}))
        torch.manual_seed(0)
        by_config = build(config.with_(sharing=Sharing(kv_of)), resolve({}))
        text = ids(2, 12)
        with torch.no_grad():
            assert torch.equal(by_method(text).nll, by_config(text).nll)
        assert by_method.config == config
        assert by_method.acting.kv_of == kv_of
