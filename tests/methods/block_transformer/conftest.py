"""Tiny models of every kind: 40 wide, so that blocks of 1, 2, 4 and 5 tokens all divide it."""

from collections.abc import Callable

import pytest
import torch

from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox, llama
from kvlab.methods.registry import resolve

VOCABULARY = 61
SHARP = {"vocab_size": VOCABULARY, "init_std": 0.3}  # logits far apart, so that argmax is stable


@pytest.fixture(params=["neox", "llama"])
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    if request.param == "neox":
        return DecoderConfig(**SHARP, **gpt_neox(40, 4, 5))
    return DecoderConfig(**SHARP, **llama(40, 4, 10, 5, 96, head_dim=8, tie_embeddings=True))


@pytest.fixture
def make(config: DecoderConfig) -> Callable[..., BlockTransformer]:
    """Return a function from params to a model of that family, in evaluation mode."""

    def build(**params: object) -> BlockTransformer:
        torch.manual_seed(0)
        method = resolve({"block_transformer": {"encoder_width": 32, **params}})
        model = BlockTransformer(config, method)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms that are not 0 and 1
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        return model.eval()

    return build


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Return a function from a shape to random token ids, never the padding id."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randint(1, VOCABULARY, shape, generator=generator)
