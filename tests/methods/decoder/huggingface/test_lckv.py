"""Folders of the code published with LCKV: read as models of a sharing method, and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox, llama
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.huggingface.settings import CheckpointError
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve
from kvlab.methods.store import load, load_config, save
from kvlab.methods.weights import read_tensors, write_tensors

FOLDERS = [Path(__file__).parents[3] / "golden/cross_layer"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]) / "cross_layer")
CASES = {
    path.stem: path
    for folder in FOLDERS
    for path in sorted(folder.glob("*.safetensors"))
    if not path.stem.startswith("convert_")
}
CASE = "sandwich_top_L6_l3"
UNREAD = "model.layers.1.self_attn.k_proj.weight"
KEYS = {
    "layer_types": "layers",
    "force_nodiag": "strict",
    "forward_passes": "forward_passes",
    "backward_passes": "backward_passes",
}
"""Keys of a config.json, and the parameters of our method that they become."""


class Published:
    """A folder with the weights of a golden case, as its code would have written it."""

    def __init__(self, name: str, folder: Path) -> None:
        path, self.folder = CASES[name], folder
        self.tensors = read_tensors(path)
        about = json.loads((path.parent / "README.json").read_text())["cases"][name]["config"]
        others = {"name", "seed", "batch", "seq_len", "init_std"}
        self.config = {k: v for k, v in about.items() if k not in others} | {
            "architectures": ["LCKVLlamaForCausalLM"],
            "model_type": "lckv-llama",
            "hidden_act": "silu",
            "num_hidden_layers": len(about["layer_types"].split("_")),
            "max_position_embeddings": 128,
            "torch_dtype": "float32",
            "transformers_version": "4.45.2",
        }
        self.weights = {
            name.removeprefix("weights."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("weights.")
        }
        self.write()

    def write(self, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
        """Write the folder with other weights or settings (None: without the key)."""
        said = {k: v for k, v in (self.config | changes).items() if v is not None}
        (self.folder / "config.json").write_text(json.dumps(said))
        write_tensors(weights or self.weights, self.folder / "model.safetensors", format="pt")
        return self.folder


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Published]:
    """A function from a golden case to its folder."""

    def make(name: str = CASE) -> Published:
        folder = tmp_path / "published"
        folder.mkdir()
        return Published(name, folder)

    return make


def logits(model: Any, ids: Tensor) -> Tensor:
    decoder = model.decoder
    found: Tensor = decoder.head(decoder.body(decoder.embed(ids)))
    return found


def say(model: Any, folder: Path) -> dict[str, Any]:
    """The config.json that a model is exported with."""
    folder.mkdir(exist_ok=True)
    write_checkpoint(model, folder)
    said: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return said


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_what_the_reference_computes(name: str, published: Callable[..., Published]) -> None:
    case = published(name)
    model = load(case.folder)
    assert isinstance(model, TokenModel)
    choice = model.method.to_dict()["sharing"]["cross_layer"]
    windowed = "s" in case.config["layer_types"]
    assert choice["window"] == (case.config["sliding_window"] if windowed else None)
    assert {ours: choice[ours] for ours in KEYS.values()} == {
        ours: case.config[theirs] for theirs, ours in KEYS.items()
    }
    assert load_config(case.folder) == model.config
    assert (model.config.sharing, model.config.windows) == (None, None)
    ids = case.tensors["input_ids"]
    close = {"rtol": 0.0, "atol": 5e-5}
    torch.testing.assert_close(logits(model, ids), case.tensors["logits"], **close)
    score = model(ids)
    loss = score.nll[score.scored].mean()
    torch.testing.assert_close(loss, case.tensors["loss"][0], rtol=0.0, atol=1e-5)
    assert generate(model, ids.tolist(), 24) == case.tensors["gen_ids"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str, published: Callable[..., Published], tmp_path: Path) -> None:
    case = published(name)
    model = load(case.folder)
    out = tmp_path / "out"
    said = say(model, out)
    assert {k: said[k] for k in KEYS} == {k: case.config[k] for k in KEYS}
    assert said["model_type"] == "lckv-llama"
    written = read_tensors(out / "model.safetensors")
    assert written.keys() == case.weights.keys()
    assert all(torch.equal(written[name], case.weights[name]) for name in written)
    again = load(out)
    assert again.describe() == model.describe()
    save(again, out)  # a folder of ours, which comes before theirs
    assert load(out).describe() == model.describe()


def test_a_released_config(tmp_path: Path) -> None:
    """Keys that the published checkpoints have; none that the code has a default for."""
    layers = "0_1_2_3_4_" + "16_" * 12 + "17_18_19_20_21"
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LCKVLlamaForCausalLM"],
                "auto_map": {
                    "AutoConfig": "configuration_lckv.LCKVLlamaConfig",
                    "AutoModelForCausalLM": "someone/model--modeling_lckv.LCKVLlamaForCausalLM",
                },
                "model_type": "lckv-llama",
                "attention_bias": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "force_nodiag": True,
                "hidden_act": "silu",
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "layer_types": layers,
                "max_position_embeddings": 2048,
                "num_attention_heads": 32,
                "num_hidden_layers": 22,
                "num_key_value_heads": 4,
                "pretraining_tp": 1,
                "rms_norm_eps": 1e-05,
                "rope_scaling": None,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "use_cache": True,
                "vocab_size": 32000,
            }
        )
    )
    from kvlab.methods.decoder.huggingface.description import read_description

    found = read_description(tmp_path)
    assert found.method.acting(found.config) == found.acting
    assert (found.config.layers, found.config.width, found.config.kv_heads) == (22, 2048, 4)
    assert found.acting.kv_layers == (0, 1, 2, 3, 4, 16, 17, 18, 19, 20, 21)
    sharing = found.acting.sharing
    assert sharing is not None
    assert (sharing.strict, sharing.forward_passes, sharing.backward_passes) == (True, 7, 2)


@pytest.mark.parametrize(
    ("method", "layer_types"),
    [
        ({"cross_layer": {"layout": "sandwich_middle", "kv_layers": 3}}, "0_2_2_2_2_5"),
        ({"lckv": {"warmup_layers": 2}}, "0_4_4_4_4_5"),
        ({"cla": {"group": 3}}, "0_0_0_3_3_3"),
        ({"yoco": {"window": 9}}, "0s_1s_2s_3_3_3"),
        ({"cross_layer": {"layers": "0_1_2_3_4_5", "strict": True}}, "0_1_2_3_4_5"),
        ({"cross_layer": {"layers": "1s_1_3_3s_5s_5", "window": 7}}, "1s_1_3_3s_5s_5"),
    ],
)
def test_every_way_of_sharing_is_exported(
    method: dict[str, Any], layer_types: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=40, **llama(32, 6, 4, 4, 40), qkv_bias=True, out_bias=True)
    model = build(config, resolve(method))
    said = say(model, tmp_path)
    assert (said["architectures"], said["layer_types"]) == (["LCKVLlamaForCausalLM"], layer_types)
    again = load(tmp_path)
    assert again.acting == model.acting
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    ids = torch.randint(40, (2, 14))
    with torch.no_grad():
        assert torch.equal(logits(again, ids), logits(model, ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [{"gqa": {"kv_heads": 2}}, {"cross_layer": {"layers": "0_1", "kv_heads": 2}}]
)
def test_sharing_of_heads_alone_is_a_plain_llama(method: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = DecoderConfig(vocab_size=40, **llama(32, 2, 4, 4, 40))
    model = build(config, resolve(method))
    said = say(model, tmp_path)
    assert (said["model_type"], said["num_key_value_heads"]) == ("llama", 2)
    assert load(tmp_path).method.to_dict() == {}
    ids = torch.randint(40, (2, 14))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    torch.testing.assert_close(logits(model, ids), theirs, rtol=0, atol=1e-5)


QWEN = llama(32, 3, 4, 2, 40, qk_norm=True)
MIXED = llama(32, 3, 4, 2, 40, windows=(4, None, None))


@pytest.mark.parametrize(
    ("sizes", "lost"),
    [
        (QWEN, "qk_norm"),
        (gpt_neox(32, 3, 4), "norm, gated, parallel, rotary_fraction"),
        (MIXED, "windows"),
    ],
    ids=["qwen", "neox", "two windows"],
)
def test_what_is_no_llama_cannot_be_exported(
    sizes: dict[str, Any], lost: str, tmp_path: Path
) -> None:
    method = resolve({"cross_layer": {"layers": "0_1s_1", "window": 9}})
    model = build(DecoderConfig(vocab_size=40, **sizes), method)
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(model, tmp_path)
    assert str(raised.value) == (
        "a model with shared KV layers can only be exported as lckv-llama, which cannot say its "
        f"{lost}"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layer_types": "0_4_4_4_4"}, "'layer_types' '0_4_4_4_4' has 5 entries, 'num_hidden_lay"),
        (
            {"layer_types": "0_4_4_4_4_6"},
            "'layer_types' '0_4_4_4_4_6' names layer 6; the last is 5",
        ),
        ({"layer_types": "0_4_4_4_4_-1"}, "'layer_types' '0_4_4_4_4_-1': entry 5 is '-1': must be"),
        ({"layer_types": "0_4_4_4_4_"}, "entry 5 is '': must be the number of a layer"),
        ({"layer_types": ""}, "'layer_types' '': entry 0 is '': must be the number of a layer"),
        ({"layer_types": "0\n_4_4_4_4_5"}, r"entry 0 is '0\n': must be the number of a layer"),
        ({"layer_types": "0,4,4,4,4,5"}, "entry 0 is '0,4,4,4,4,5': must be the number of a la"),
        ({"layer_types": "0_4w_4_4_4_5"}, "entry 1 is '4w': must be the number of a layer"),
        ({"layer_types": ["full_attention"] * 6}, "'layer_types' must be str, found ['full_atten"),
        ({"layer_types": "0s_4_4_4_4_5", "sliding_window": 0}, "windows: must be at least 1"),
        ({"layer_types": "0s_4_4_4_4_5", "sliding_window": "9"}, "'sliding_window' must be int"),
        ({"forward_passes": -1}, "forward_passes must be at least 0"),
        ({"backward_passes": 0}, "backward_passes at least 1"),
        ({"forward_passes": 7.5}, "'forward_passes' must be int, found 7.5"),
        ({"backward_passes": 5000}, "backward_passes: must be int from 1 to 1024, found 5000"),
        ({"force_nodiag": 1}, "'force_nodiag' must be bool, found 1"),
        ({"use_sequential": "no"}, "'use_sequential' must be bool, found 'no'"),
        ({"target_layer": 5, "num_encoders": 8}, "not supported: 'num_encoders', 'target_layer'"),
        ({"auto_map": {"AutoModel": "mine.Mine"}}, "'auto_map' 'mine.Mine' is not supported (LCK"),
        ({"attention_dropout": 0.1}, "'attention_dropout' 0.1"),
        ({"architectures": ["LlamaForCausalLM"]}, "not supported: 'backward_passes', 'force_nod"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "'layer_types' must be list, found '0_4_4_4_4"),
        ({"architectures": ["MistralForCausalLM"]}, "'force_nodiag', 'forward_passes', 'layer_ty"),
    ],
    ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else "",
)
def test_settings_that_are_refused(
    changes: dict[str, Any], error: str, published: Callable[..., Published]
) -> None:
    folder = published().write(**changes)
    for read in (load, load_config):
        with pytest.raises(KvlabError, match=r"config\.json: ") as raised:
            read(folder)
        assert error in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_window_that_is_null(published: Callable[..., Published]) -> None:
    """Absent it is 4096, as in the published code."""
    case = published()
    folder = case.write(layer_types="0s_4_4_4_4_5", sliding_window=None)
    assert load(folder).acting.windows == (4096, None, None, None, None, None)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"sliding_window": None}))
    with pytest.raises(CheckpointError, match="'sliding_window' is missing: 0s_4_4_4_4_5 needs"):
        load(folder)


@pytest.mark.parametrize("layer_types", [None, "0_1_2_3_4_5"])
def test_a_map_in_which_nobody_shares(
    layer_types: str | None, published: Callable[..., Published]
) -> None:
    case = published()
    own = {
        f"model.layers.{i}.self_attn.{part}_proj.weight": torch.randn(16, 32)
        for i in range(6)
        for part in "kv"
    }
    model = load(case.write(case.weights | own, layer_types=layer_types))
    assert model.method.to_dict() == {}
    assert model.acting == model.config


@torch.no_grad()
def test_keys_and_values_that_nobody_reads(published: Callable[..., Published]) -> None:
    """The published code loads a plain checkpoint under a map by dropping them; so do we."""
    case = published()
    unread = {UNREAD: torch.ones(16, 32), UNREAD.replace("k_proj", "v_proj"): torch.ones(16, 32)}
    model = load(case.write(case.weights | unread))
    ids = case.tensors["input_ids"]
    torch.testing.assert_close(logits(model, ids), case.tensors["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            {"model.layers.4.self_attn.k_proj.weight": None},
            "layers.4.self_attn.k_proj.weight' is m",
        ),
        (
            {"model.layers.1.self_attn.q_proj.weight": None},
            "layers.1.self_attn.q_proj.weight' is m",
        ),
        ({"model.layers.4.self_attn.k_proj.bias": (16,)}, "layers.4.self_attn.k_proj.bias' is not"),
        ({"model.layers.6.self_attn.k_proj.weight": (16, 32)}, "k_proj.weight' is not part of"),
        ({"model.layers.4.self_attn.v_proj.weight": (8, 32)}, r"qkv.weight' must be \[64, 32\], f"),
    ],
    ids=["no keys", "no queries", "a bias", "a layer more", "heads too few"],
)
def test_tensors_that_do_not_fit(
    change: dict[str, Any], error: str, published: Callable[..., Published]
) -> None:
    case = published()
    weights = dict(case.weights)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.ones(shape)
    with pytest.raises(KvlabError, match=error):
        load(case.write(weights))
