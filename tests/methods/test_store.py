"""Models on disk: what is saved is loaded, and what cannot be loaded is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.build import build
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve
from kvlab.methods.store import load, save
from kvlab.methods.weights import read_tensors, write_tensors


def test_round_trip(model: TokenModel, ids: Callable[..., Tensor], tmp_path: Path) -> None:
    model.save(tmp_path)
    state = torch.get_rng_state()
    again = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing
    assert again.describe() == model.describe()
    text = ids(2, 9)
    assert torch.equal(again(text).nll, model(text).nll)
    again(text).nll.sum().backward()


def test_a_block_model(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = build(tiny("llama").config, resolve({"block_transformer": {"block_length": 2}}))
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.method == model.method or again.method.to_dict() == model.method.to_dict()
    text = ids(1, 8)
    assert torch.equal(again(text).nll, model(text).nll)


def test_the_stored_dtype_is_kept(tiny: Callable[..., TokenModel], tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save(tmp_path)
    assert next(load(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(load(tmp_path, dtype=torch.float32).parameters()).dtype == torch.float32


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.json"
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return apply


def retensor(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = read_tensors(folder / "model.safetensors")
        change(tensors)
        write_tensors(tensors, folder / "model.safetensors")

    return apply


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut weights": (
        lambda f: cut(f / "model.safetensors"),
        r"model\.safetensors: no readable safetensors file",
    ),
    "random bytes": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80" * 64),
        r"model\.safetensors: no readable safetensors file",
    ),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: no readable safetensors file",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors: no readable safetensors file",
    ),
    "no description": (
        lambda f: (f / "model.json").unlink(),
        r"holds no model \(neither model.json nor config.json\)",
    ),
    "half a description": (lambda f: cut(f / "model.json"), r"model\.json: no readable model desc"),
    "a list": (lambda f: (f / "model.json").write_text("[1]"), r"model\.json: no readable model"),
    "no config": (edit(lambda d: d.pop("config")), r"model\.json: 'config' is missing"),
    "no method": (edit(lambda d: d.pop("method")), r"model\.json: 'method' is missing"),
    "unknown setting": (
        edit(lambda d: d["config"].update(depth=1)),
        r"model\.json: .*unknown decoder settings: depth",
    ),
    "impossible size": (
        edit(lambda d: d["config"].update(kv_heads=3)),
        r"model\.json: .*kv_heads: must divide",
    ),
    "unknown method": (
        edit(lambda d: d.update(method={"granularity": {"blok": {}}})),
        r"model\.json: unknown method 'blok'",
    ),
    "method of no form": (edit(lambda d: d.update(method=[1])), r"model\.json: "),
    "other sizes": (
        edit(lambda d: d["config"].update(ffn_width=24)),
        r"model\.safetensors: tensor 'decoder.layers.0.mlp.gate.weight' must be \[24, 32\]",
    ),
    "a missing tensor": (
        retensor(lambda t: t.pop("decoder.norm.weight")),
        r"model\.safetensors: tensor 'decoder.norm.weight' is missing",
    ),
    "one too many": (
        retensor(lambda t: t.update(extra=torch.ones(1))),
        r"model\.safetensors: tensor 'extra' has no place",
    ),
    "integers": (
        retensor(lambda t: t.update({"decoder.norm.weight": torch.ones(32).int()})),
        r"tensor 'decoder.norm.weight' is torch.int32, not a float",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(tiny: Callable[..., TokenModel], tmp_path: Path, case: str) -> None:
    tiny("llama").save(tmp_path)
    breaking, error = BROKEN[case]
    breaking(tmp_path)
    with pytest.raises(KvlabError, match=error) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KvlabError, match="holds no model"):
        load(tmp_path / "nowhere")
