"""Predicted bytes are those of the live storages, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvlab.methods.cache.storage import Space, Storage
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.registry import resolve

WRITTEN: list[dict[str, Any]] = [
    {"int8": {}},
    {"fp8": {}},
    {"fp8": {"scale": "none"}},
    {"kivi": {}},
    {"kivi": {"bits": 2, "group": 16, "residual": 48}},
    {"kivi": {"bits": 2, "group": 128}},
]


@pytest.mark.parametrize("written", WRITTEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [6, 32, 128])
@pytest.mark.parametrize("rows", [1, 37, 128, 129, 300])
def test_bytes(written: dict[str, Any], dtype: torch.dtype, head_dim: int, rows: int) -> None:
    config = DecoderConfig(vocab_size=9, **llama(32, 3, 4, 2, 48, head_dim=head_dim))
    method = resolve(written)
    choice = method["precision"]
    space = Space(5, config.kv_heads, rows, head_dim, torch.device("cpu"), dtype)
    storage: Storage = choice.value.load()(choice.params, space)
    predicted = cost_of(config, method).kv_bytes(rows, dtype.itemsize)
    assert 5 * predicted == 3 * storage.nbytes()


def test_two_bits_of_long_texts() -> None:
    """3 bits a number with groups of 32, as the paper's tables count, and 2.25 with 128."""
    config = DecoderConfig(vocab_size=9, **llama(1024, 4, 8, 8, 48))
    full = cost_of(config, resolve({})).kv_bytes(2**20, 2)
    for group, bits in ((32, 3.0), (128, 2.25)):
        method = resolve({"kivi": {"bits": 2, "group": group}})
        share = cost_of(config, method).kv_bytes(2**20, 2) / full
        assert share == pytest.approx(bits / 16, rel=2e-3)
