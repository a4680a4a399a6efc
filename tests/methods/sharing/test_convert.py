"""Conversion to shared keys and values: the reference's numbers, and every family's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.build import build, convert
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.layers import Attention
from kvlab.methods.registry import resolve
from kvlab.methods.sharing.layouts import LAYOUTS
from kvlab.methods.store import load

CASE = Path(__file__).parents[2] / "golden/cross_layer/convert_sandwich_top_L6_l3.safetensors"

Tiny = Callable[..., TokenModel]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(CASE)


@pytest.fixture
def source(golden: dict[str, Tensor], tmp_path: Path) -> TokenModel:
    """The checkpoint that the reference converted, read as any other."""
    about = json.loads((CASE.parent / "README.json").read_text())["conversion_cases"][CASE.stem]
    config = {
        name: value
        for name, value in about["config"].items()
        if name.startswith(("vocab", "hidden", "intermediate", "num_", "rms", "rope"))
    }
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"num_hidden_layers": 6, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {
        name.removeprefix("source."): tensor
        for name, tensor in golden.items()
        if name.startswith("source.")
    }
    save_file(weights, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert isinstance(model, TokenModel)
    return model.eval()


def logits(model: TokenModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decoder.head(model.decoder.body(model.decoder.embed(ids)))


def attention(model: TokenModel | BlockTransformer, layer: int) -> Attention:
    decoder = model.decoder if isinstance(model, TokenModel) else model.block_decoder
    found: Attention = decoder.layers[layer].attention  # type: ignore[assignment, union-attr]
    return found


def keys_values(part: Attention, name: str = "weight") -> Tensor:
    """Of a KV layer: [2, kv_heads, D, ...]."""
    rows: Tensor = getattr(part.qkv, name)[part.heads * part.head_dim :]
    return rows.view(2, part.kv_heads, part.head_dim, *rows.shape[1:])


@pytest.mark.parametrize(("merge", "prefix"), [("mean", "converted"), ("pick", "direct")])
def test_the_reference_converts_alike(
    source: TokenModel, golden: dict[str, Tensor], merge: str, prefix: str
) -> None:
    method = resolve({"cross_layer": {"layers": "0_4_4_4_4_5", "merge": merge}})
    model = convert(source, method).eval()
    assert isinstance(model, TokenModel)
    torch.testing.assert_close(
        logits(model, golden["input_ids"]), golden[f"{prefix}.logits"], atol=5e-5, rtol=0
    )
    for layer in (0, 4, 5) if merge == "mean" else ():
        for part, letter in enumerate("kv"):
            name = f"converted.model.layers.{layer}.self_attn.{letter}_proj.weight"
            made = keys_values(attention(model, layer))[part].flatten(0, 1)
            torch.testing.assert_close(made, golden[name], atol=1e-7, rtol=0)


def test_every_layer_its_own_changes_nothing(model: TokenModel, ids: Any) -> None:
    """Of each family: nothing is fresh, and the copy owns its memory."""
    layers = model.config.layers
    methods = [
        {},
        {"cross_layer": {"kv_layers": layers}},
        {"gqa": {"kv_heads": model.config.kv_heads}},
    ]
    for written in methods:
        child = convert(model, resolve(written))
        assert isinstance(child, TokenModel)
        assert child.fresh == frozenset()
        rows = ids(2, 7)
        torch.testing.assert_close(logits(child, rows), logits(model, rows), atol=0, rtol=0)
        for name, parameter in child.named_parameters():
            assert parameter.data_ptr() != model.get_parameter(name).data_ptr()


@pytest.mark.parametrize("merge", ["mean", "pick"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_of_each_family(family: str, tiny: Tiny, layout: str, merge: str) -> None:
    """By definition, written once more: rows of queries are copied, those of keys are means."""
    parent = tiny(family, layers=5, windows=None)
    config = parent.config
    written = {"layout": layout, "kv_layers": 2, "merge": merge, "kv_heads": 1}
    child = convert(parent, resolve({"cross_layer": written}))
    assert isinstance(child, TokenModel)
    kv_of = child.decoder.config.kv_of
    theirs, ours = parent.state_dict(), child.state_dict()
    for layer in range(5):
        mine = attention(child, layer)
        queries = config.heads * config.head_dim
        readers = [i for i in range(5) if kv_of[i] == layer]
        taken = readers if merge == "mean" else readers and [layer]
        assert mine.owns_kv == bool(readers)
        for name in ("weight", "bias") if config.qkv_bias else ("weight",):
            rows = getattr(attention(parent, layer).qkv, name)
            assert torch.equal(getattr(mine.qkv, name)[:queries], rows[:queries])
            if readers:
                read = [keys_values(attention(parent, i), name) for i in taken]
                mean = torch.stack(read).mean(0).mean(1, keepdim=True)
                torch.testing.assert_close(keys_values(mine, name), mean)
        assert (mine.k_norm is not None) == (config.qk_norm and bool(readers))
        if mine.k_norm is not None:
            read = [attention(parent, i).k_norm.weight for i in taken]  # type: ignore[union-attr]
            torch.testing.assert_close(mine.k_norm.weight, torch.stack(read).mean(0))
    for name, tensor in ours.items():
        if "qkv" not in name and "k_norm" not in name:
            assert torch.equal(tensor, theirs[name]), name


def test_what_is_fresh_is_what_was_averaged(tiny: Tiny) -> None:
    parent = tiny("qwen3", layers=4)
    shared = {"cross_layer": {"layers": "0_2_2_3"}}
    layer = "decoder.layers.2.attention."
    names = {f"{layer}{name}" for name in ("qkv.weight", "qkv.bias", "k_norm.weight")}
    assert convert(parent, resolve(shared)).fresh == names
    shared["cross_layer"]["merge"] = "pick"
    assert convert(parent, resolve(shared)).fresh == frozenset()
    assert len(convert(parent, resolve({"gqa": {"kv_heads": 1}})).fresh) == 8


def test_a_parent_that_shares(tiny: Tiny) -> None:
    """What each reader read there counts, and the same sharing again is a copy."""
    cla = resolve({"cla": {"group": 2}})
    parent = convert(tiny("llama", layers=4), cla)
    assert isinstance(parent, TokenModel)
    again = convert(parent, cla)
    assert again.fresh == frozenset()
    torch.testing.assert_close(again.state_dict(), parent.state_dict(), atol=0, rtol=0)
    child = convert(parent, resolve({"cross_layer": {"layers": "0_3_3_3"}}))
    assert isinstance(child, TokenModel)
    low, high = (keys_values(attention(parent, i)) for i in (0, 2))
    torch.testing.assert_close(keys_values(attention(child, 3)), (low + 2 * high) / 3)
    torch.testing.assert_close(keys_values(attention(child, 0)), low, atol=0, rtol=0)
    own = convert(parent, resolve({}))
    assert isinstance(own, TokenModel)
    assert own.fresh == frozenset()
    assert torch.equal(keys_values(attention(own, 3)), high)


def test_half_precision_is_averaged_in_full(tiny: Tiny) -> None:
    parent = tiny("llama", layers=3).to(torch.bfloat16)
    child = convert(parent, resolve({"cross_layer": {"layers": "0_0_0"}}))
    assert isinstance(child, TokenModel)
    read = [keys_values(attention(parent, i)).float() for i in range(3)]
    expected = torch.stack(read).mean(0).to(torch.bfloat16)
    assert torch.equal(keys_values(attention(child, 0)), expected)


@pytest.mark.parametrize("kind", ["split", "skip", "duplicate"])
def test_a_block_decoder_that_shares(tiny: Tiny, kind: str) -> None:
    parent = tiny("llama", layers=4)
    block = {"block_length": 2, "layers": kind}
    method = resolve({"block_transformer": block, "cla": {"kv_heads": 1}})
    model = convert(parent, method)
    assert isinstance(model, BlockTransformer)
    assert model.block_decoder.config.kv_of == method.acting(parent.config).kv_of
    taken = {"split": [0, 1], "skip": [0, 2], "duplicate": [0, 1]}[kind]
    read = torch.stack([keys_values(attention(parent, i)) for i in taken])
    torch.testing.assert_close(keys_values(attention(model, 0)), read.mean(0).mean(1, keepdim=True))
    assert "block_decoder.layers.0.attention.qkv.weight" in model.fresh
    assert not any("token_decoder.decoder.layers" in name for name in model.fresh)
    assert model.token_decoder.decoder.config.sharing is None


def test_heads_that_cannot_be_pooled(tiny: Tiny) -> None:
    parent = convert(tiny("neox"), resolve({"gqa": {"kv_heads": 2}}))
    for written in ({}, "block_transformer", {"cla": {"kv_heads": 4}}):
        with pytest.raises(KvlabError, match="parent has 2 key/value heads, which cannot be"):
            convert(parent, resolve(written))


def test_a_converted_model_is_stored_and_read_back(tiny: Tiny, ids: Any, tmp_path: Path) -> None:
    child = convert(tiny("qwen3", layers=4), resolve({"lckv": {"kv_heads": 1}}))
    child.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(child, TokenModel)
    assert isinstance(again, TokenModel)
    assert again.config == child.config
    assert again.method.to_dict() == child.method.to_dict()
    rows = ids(2, 7)
    torch.testing.assert_close(logits(again, rows), logits(child, rows), atol=0, rtol=0)


def test_only_decoders_over_tokens_are_converted(tiny: Tiny) -> None:
    block = build(tiny("llama").config, resolve("block_transformer"))
    with pytest.raises(KvlabError, match="cannot be converted back to tokens"):
        convert(block, resolve("cla"))
