"""Tiny decoders of every family, with weights far enough apart that an argmax is stable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvlab.methods.decoder.config import DecoderConfig, RopeScaling, gpt_neox, llama
from kvlab.methods.decoder.huggingface.reader import read_checkpoint
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

VOCABULARY = 53

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": llama(32, 2, 4, 2, 48),
    "llama3": llama(
        32, 2, 4, 1, 48, head_dim=6, tie_embeddings=True,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    ),
    "mistral": llama(32, 3, 4, 4, 48, windows=(5, None, 5), rope_scaling=RopeScaling("linear", 2)),
    "qwen3": llama(32, 2, 4, 2, 48, qk_norm=True, qkv_bias=True),
    "neox": gpt_neox(32, 2, 4),
}  # fmt: skip


def build(family: str, **changes: Any) -> TokenModel:
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=VOCABULARY, **(FAMILIES[family] | changes))
    model = TokenModel(config, resolve("full_attention")).eval()
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.25)
    return model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family in turn."""
    return str(request.param)


@pytest.fixture
def model(family: str) -> TokenModel:
    """A tiny model of each family in turn, in evaluation mode."""
    return build(family)


@pytest.fixture
def tiny() -> Callable[..., TokenModel]:
    """A function from a family and changes of its config to a tiny model."""
    return build


@pytest.fixture
def ids() -> Callable[..., Tensor]:
    """A function from a shape to random token ids."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randint(VOCABULARY, shape, generator=generator)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[dict[str, Any], dict[str, Tensor]], TokenModel]:
    """A function from a golden file's sizes and tensors to the model, read as a checkpoint."""

    def read(sizes: dict[str, Any], tensors: dict[str, Tensor]) -> TokenModel:
        weights = {name[2:]: t for name, t in tensors.items() if name.startswith("w.")}
        config = {"model_type": "llama", "hidden_act": "silu", "rope_theta": 10000.0} | sizes
        config.pop("sliding_window", None)
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_checkpoint(tmp_path).eval()

    return read
