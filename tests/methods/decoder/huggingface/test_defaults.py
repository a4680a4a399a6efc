"""A key that a config.json leaves out means what transformers takes it to mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.huggingface.settings import CheckpointError
from kvlab.methods.store import load_config

WINDOWS = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", WINDOWS | {"num_hidden_layers": 30}),
    "qwen3": ("Qwen3", {}),
    "qwen3 with windows": ("Qwen3", WINDOWS | {"num_hidden_layers": 30}),
    "neox": ("GPTNeoX", {}),
}


def understood(raw: dict[str, Any], folder: Path) -> DecoderConfig | str:
    """What kvlab reads, or the name of the key that it wants."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        return load_config(folder)
    except CheckpointError as error:
        return str(error)


def completed(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The file as transformers understands it, every key written out."""
    config = getattr(transformers, f"{name}Config").from_dict(json.loads(json.dumps(raw)))
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return whole | {"architectures": raw["architectures"]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_key_left_out(kind: str, tmp_path: Path) -> None:
    name, changes = CONFIGS[kind]
    raw = completed(name, {**changes, "architectures": [f"{name}ForCausalLM"]})
    assert isinstance(understood(raw, tmp_path), DecoderConfig)
    for key in sorted(raw.keys() - {"architectures"}):
        less = {k: v for k, v in raw.items() if k != key}
        found = understood(less, tmp_path)
        if isinstance(found, str):
            contradicts = key == "use_sliding_window" and "'layer_types' does not fit" in found
            assert contradicts or f"'{key}' is missing" in found
        else:
            assert found == understood(completed(name, less), tmp_path), key


@pytest.mark.parametrize("kind", CONFIGS)
def test_rotary_settings_left_out(kind: str, tmp_path: Path) -> None:
    """Inside `rope_parameters`, and in files that have the old keys or none."""
    name, changes = CONFIGS[kind]
    raw = completed(name, {**changes, "architectures": [f"{name}ForCausalLM"]})
    rope = raw.pop("rope_parameters")
    written = [{}, *({"rope_parameters": rope | {key: None}} for key in rope)]
    for part in written:
        some = {k: {a: b for a, b in v.items() if b is not None} for k, v in part.items()}
        found = understood(raw | some, tmp_path)
        assert found == understood(completed(name, raw | some), tmp_path)


def test_windows_without_a_size(tmp_path: Path) -> None:
    for name in ("Qwen2", "Qwen3"):
        raw = completed(name, {"architectures": [f"{name}ForCausalLM"]})
        for key in ("sliding_window", "layer_types"):
            del raw[key]
        read = understood(raw | {"use_sliding_window": True}, tmp_path)
        assert isinstance(read, DecoderConfig)
        assert read.windows == (None,) * 28 + (4096,) * 4


def test_keys_that_say_nothing(tmp_path: Path) -> None:
    raw = completed("Mistral", {"architectures": ["MistralForCausalLM"]})
    said = {"tokenizer_class": "LlamaTokenizer", "attention_bias": False}
    assert understood(raw | said, tmp_path) == understood(raw, tmp_path)
    assert "'attention_bias' True" in str(understood(raw | {"attention_bias": True}, tmp_path))


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ({}, (1, 2)),
        ({"pad_token_id": 7, "bos_token_id": 5}, (5, 7)),
        ({"pad_token_id": -1, "eos_token_id": [9, 8]}, (1, 9)),
        ({"bos_token_id": None, "eos_token_id": None}, (0, 0)),
    ],
)
def test_token_ids(said: dict[str, Any], ids: tuple[int, int], tmp_path: Path) -> None:
    raw = completed("Llama", {"architectures": ["LlamaForCausalLM"]})
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del raw[key]
    read = understood(raw | said, tmp_path)
    assert isinstance(read, DecoderConfig)
    assert (read.bos_id, read.pad_id) == ids
