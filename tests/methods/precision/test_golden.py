"""The KIVI repository's own numbers (tests/golden/precision/README.json)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.kernels.quantise import dequantise, pack, quantise, unpack
from kvlab.methods.cache.storage import Space
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.precision.kivi.params import KiviParams
from kvlab.methods.precision.kivi.recent import NOWHERE, Recent
from kvlab.methods.precision.kivi.storage import Kivi
from kvlab.methods.registry import resolve

FOLDERS = [Path(__file__).parents[2] / "golden/precision"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]) / "precision")
FILES = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))}
CLOSE = {"atol": 2e-5, "rtol": 0.0}


class Case:
    """A golden file and what the README says of it."""

    def __init__(self, name: str) -> None:
        path = FILES[name]
        self.tensors = load_file(path)
        cases = json.loads((path.parent / "README.json").read_text())["cases"]
        self.about = next(case for case in cases if case["name"] == name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def params(self) -> KiviParams:
        a = self.about
        return KiviParams(a["k_bits"], a["group_size"], a["residual_length"])

    def storage(self, layer: int) -> tuple[Kivi, Tensor, Tensor]:
        """An empty storage with room for a row more, and the rows that reached the layer."""
        k, v = self[f"in.k.{layer}"], self[f"in.v.{layer}"]
        batch, heads, rows, head_dim = k.shape
        space = Space(batch, heads, rows + 1, head_dim, k.device, k.dtype)
        return Kivi(self.params(), space), k, v

    def model(self) -> TokenModel:
        sizes = self.about["model"]
        config = DecoderConfig(
            **llama(
                sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"],
                sizes["num_key_value_heads"], sizes["intermediate_size"],
            ),
            vocab_size=sizes["vocab_size"],
            norm_eps=sizes["rms_norm_eps"],
            rope_theta=sizes["rope_theta"],
            max_positions=sizes["max_position_embeddings"],
        )  # fmt: skip
        found = {
            "embedding": ["model.embed_tokens"], "norm": ["model.norm"], "output": ["lm_head"],
        }  # fmt: skip
        for i in range(config.layers):
            theirs = f"model.layers.{i}"
            found |= {
                f"layers.{i}.attention_norm": [f"{theirs}.input_layernorm"],
                f"layers.{i}.mlp_norm": [f"{theirs}.post_attention_layernorm"],
                f"layers.{i}.attention.out": [f"{theirs}.self_attn.o_proj"],
                f"layers.{i}.attention.qkv": [f"{theirs}.self_attn.{x}_proj" for x in "qkv"],
            } | {f"layers.{i}.mlp.{x}": [f"{theirs}.mlp.{x}_proj"] for x in ("gate", "up", "down")}
        weights = {
            f"decoder.{ours}.weight": torch.cat([self[f"w.{name}.weight"] for name in names])
            for ours, names in found.items()
        }
        model = TokenModel(config, resolve({}))
        model.load_state_dict(weights)
        return model.eval()


def of_kind(kind: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"kivi_{kind}")]


def one_row(k: Tensor, v: Tensor, row: int, slot: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.full((len(k), 1, 1), slot)
    return slots, k[:, :, row : row + 1], v[:, :, row : row + 1]


@pytest.mark.parametrize("name", of_kind("quant"))
def test_codes_scales_and_packed_words(name: str) -> None:
    case = Case(name)
    group = case.about["group_size"]
    runs = [("", bits) for bits in case.about["bits"]]
    runs += [("half.", bits) for bits in case.about["half_bits"]]
    for half, bits in runs:
        for part, dim in (("k", -2), ("v", -1)):
            x = case[f"{half}in.{part}"]
            grouped = x.unflatten(dim, (-1, group))
            codes, scale, low = quantise(grouped, bits, dim)
            out = {key: case[f"{half}out.{part}_{key}.{bits}"]
                   for key in ("q", "scale", "min", "packed", "deq")}  # fmt: skip
            assert torch.equal(codes.view_as(x), out["q"])
            assert torch.equal(scale.view_as(out["scale"]), out["scale"])
            assert torch.equal(low.view_as(out["min"]), out["min"])
            assert torch.equal(dequantise(codes, scale, low).view_as(x), out["deq"])
            packed = pack(codes, bits, dim)
            words = packed.flatten(dim - 1, dim)
            words = words.transpose(-1, -2) if part == "k" else words
            assert torch.equal(words.contiguous().view(torch.int32), out["packed"])
            assert torch.equal(unpack(packed, bits, dim), codes)


@pytest.mark.parametrize("name", of_kind("cache"))
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_a_layer(name: str, chunk: int | None) -> None:
    """State and views after the prompt and after the last step, as the next step finds them.

    The reference quantises at the end of a step, here the next row's coming does.
    """
    case = Case(name)
    prompt = case["in.prompt_ids"].shape[1]
    for layer in range(case.about["model"]["num_hidden_layers"]):
        storage, k, v = case.storage(layer)
        if chunk is None:
            storage.fill(k[:, :, :prompt], v[:, :, :prompt], torch.full((len(k),), prompt))
        else:
            for first in range(0, prompt, chunk):
                rows = slice(first, min(first + chunk, prompt))
                storage.put(rows, k[:, :, rows], v[:, :, rows])
        lengths = case["out.lengths"][:, layer].tolist()
        rows = k.shape[2]
        for row in range(prompt, rows + 1):
            storage.put(*one_row(k, v, min(row, rows - 1), row))
            key_rows, value_rows = (waiting(of) - 1 for of in (storage.keys, storage.values))
            found = [row - key_rows, key_rows, row - value_rows, value_rows]
            assert found == lengths[row - prompt]
            if row in (prompt, rows):
                assert_state(case, storage, layer, "prefill" if row == prompt else "final", row)
            else:
                assert torch.equal(storage.get(row + 1)[0][:, :, row], k[:, :, row])


def waiting(recent: Recent) -> int:
    counts = (recent.slots != NOWHERE).sum(-1)
    assert counts.min() == counts.max()
    return int(counts.max())


def assert_state(case: Case, storage: Kivi, layer: int, when: str, rows: int) -> None:
    def golden(part: str) -> Tensor | None:
        return case.tensors.get(f"{when}.{part}.{layer}")

    for part, found in zip(("k_view", "v_view"), storage.get(rows), strict=True):
        assert torch.equal(found, case[f"{when}.{part}.{layer}"])
    if (codes := golden("k_q")) is not None:
        count = codes.shape[2]
        groups = count // storage.group
        found = unpack(storage.key_codes, storage.bits, -2).flatten(2, 3)
        assert torch.equal(found[:, :, :count], codes)
        assert torch.equal(storage.key_scale[:, :, :groups, 0], case[f"{when}.k_scale.{layer}"])
        assert torch.equal(storage.key_low[:, :, :groups, 0], case[f"{when}.k_min.{layer}"])
        assert bool((storage.key_scale[:, :, groups:] < 0).all())
    if (codes := golden("v_q")) is not None:
        count = codes.shape[2]
        found = unpack(storage.value_codes, storage.bits, -1)[..., : storage.width].flatten(3)
        assert torch.equal(found[:, :, :count], codes)
        scale, low = storage.value_scale[..., 0], storage.value_low[..., 0]
        assert torch.equal(scale[:, :, :count], case[f"{when}.v_scale.{layer}"])
        assert torch.equal(low[:, :, :count], case[f"{when}.v_min.{layer}"])
        assert not scale[:, :, count:-1].any()


@pytest.mark.parametrize("name", of_kind("cache"))
def test_logits_through_the_decoder(name: str) -> None:
    case = Case(name)
    params = case.params()
    method = resolve({
        "full_attention": {},
        "kivi": {"bits": params.bits, "group": params.group, "residual": params.residual},
    })  # fmt: skip
    steps = case["in.decode_ids"]
    session = case.model().start(case["in.prompt_ids"], new_tokens=steps.shape[1], apply=method)
    torch.testing.assert_close(session.logits, case["out.prefill_last_logits"], **CLOSE)
    for i, tokens in enumerate(steps.unbind(1)):
        session.step(tokens)
        torch.testing.assert_close(session.logits, case["out.decode_logits"][:, i], **CLOSE)
