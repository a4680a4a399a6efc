"""Tiny random checkpoints, written by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
MIXED = ["full_attention", "sliding_attention", "full_attention"]

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3.1": (
        "Llama",
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama with biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": LINEAR},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 mixed": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": MIXED,
        },
    ),
    "neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "neox in sequence": (
        "GPTNeoX",
        {
            "num_key_value_heads": 4,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "rope_parameters": PARTIAL,
        },
    ),
}


@pytest.fixture
def write() -> Callable[..., Any]:
    """A function that writes a checkpoint of a kind into a folder and returns its model."""

    def make(kind: str, folder: Path, shard: str = "5GB", dtype: torch.dtype | None = None) -> Any:
        import transformers

        name, changes = CHECKPOINTS[kind]
        config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=shard)
        return model

    return make


@pytest.fixture(params=list(CHECKPOINTS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of checkpoint in turn."""
    return str(request.param)
