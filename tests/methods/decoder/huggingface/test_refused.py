"""Every setting that would change the maths is refused by name; broken files in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.store import load, load_config
from kvlab.methods.weights import read_tensors, write_tensors

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is mis"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "'mscale'"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' 0.5"),
    ("llama", {"hidden_act": "relu"}, "'hidden_act' 'relu'"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'"),
    ("llama", {"sliding_window": 64}, "'sliding_window'"),
    ("llama", {"logit_scale": 0.1}, "'logit_scale'"),
    (
        "llama",
        {"attention_multiplier": 2.0, "residual_multiplier": 0.2},
        "'attention_multiplier', ",
    ),
    ("llama", {"attention_dropout": 0.1}, "'attention_dropout' 0.1"),
    ("llama", {"auto_map": {"AutoModel": "model.Mine"}}, "'auto_map'"),
    ("llama", {"head_dim": 7}, "must be even"),
    ("llama", {"num_attention_heads": 0}, "'num_attention_heads' must be at least 1, found 0"),
    ("llama", {"num_attention_heads": "4"}, "'num_attention_heads' must be int, found '4'"),
    ("llama", {"num_key_value_heads": 3}, "must divide heads"),
    ("llama", {"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
    ("llama", {"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; Llama"),
    ("mistral", {"sliding_window": 0}, "windows: must be at least 1"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "'layer_types' 'chunked_attention'"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' does not fit"),
    ("qwen3", {"mlp_only_layers": [1]}, "'mlp_only_layers'"),
    ("qwen3", {"num_experts": 8}, "'num_experts'"),
    ("neox", {"hidden_dropout": 0.1}, "'hidden_dropout' 0.1"),
    ("neox", {"num_key_value_heads": 2}, "'num_key_value_heads' 2"),
]


@pytest.mark.parametrize(("kind", "changes", "error"), REFUSED, ids=lambda x: str(x)[:40])
def test_settings(
    write: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    error: str,
) -> None:
    write(kind, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    path.write_text(json.dumps(config | changes))
    with pytest.raises(KvlabError, match=r"config\.json: ") as raised:
        load(tmp_path)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(KvlabError):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "no readable JSON"),
        ("[" * 99999, "no readable JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "architecture none is"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(KvlabError, match=error):
        load(tmp_path)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, *shape: int) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("kind", "change", "error"),
    [
        ("llama", without("model.layers.1.self_attn.k_proj.weight"), "k_proj.weight' is missing"),
        ("llama", with_("model.layers.0.self_attn.q_proj.bias", 32), "q_proj.bias' is not part of"),
        ("llama", with_("model.layers.9.mlp.up_proj.weight", 4), "layers.9.mlp.up_proj.weight' is"),
        ("llama", with_("model.norm.weight", 31), r"'decoder.norm.weight' must be \[32\]"),
        ("qwen2", with_("lm_head.weight", 61, 32), "'lm_head.weight' differs from the embeddings"),
    ],
)
def test_tensors(
    write: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, Any]], object],
    error: str,
) -> None:
    write(kind, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    change(tensors)
    write_tensors(tensors, tmp_path / "model.safetensors", format="pt")
    with pytest.raises(KvlabError, match=error):
        load(tmp_path)


def test_tensors_that_nothing_needs(write: Callable[..., Any], tmp_path: Path) -> None:
    """Old Pythia files carry masks and frequencies; a tied head may be stored all the same."""
    write("neox in sequence", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = read_tensors(path)
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    write_tensors(tensors, path, format="pt")
    load(tmp_path)


def test_shards(write: Callable[..., Any], tmp_path: Path) -> None:
    write("llama", tmp_path, shard="12KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(KvlabError, match=f"{shards[1].name}: no readable safetensors"):
        load(tmp_path)
    shards[1].unlink()
    with pytest.raises(KvlabError, match=f"{shards[1].name}: no readable safetensors"):
        load(tmp_path)
    for text, error in (
        ("{}", "no readable index"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "is not a file name in this folder"),
        (whole[: len(whole) // 2], "no readable index"),
    ):
        index.write_text(text)
        with pytest.raises(KvlabError, match=error):
            load(tmp_path)
    index.unlink()
    with pytest.raises(KvlabError, match=r"holds neither model\.safetensors nor"):
        load(tmp_path)
