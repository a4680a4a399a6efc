"""Checkpoints that transformers wrote give its logits, and go back to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.methods.build import build, convert
from kvlab.methods.decoder.generation import generate
from kvlab.methods.decoder.huggingface.settings import CheckpointError
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve
from kvlab.methods.store import load


def logits(model: Any, text: Tensor) -> Tensor:
    decoder = model.decoder
    found: Tensor = decoder.head(decoder.body(decoder.embed(text)))
    return found


@torch.no_grad()
def test_logits_both_ways(kind: str, write: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    theirs = write(kind, tmp_path / "in", shard="12KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    ours = load(tmp_path / "in")
    torch.testing.assert_close(logits(ours, text), theirs(text).logits, rtol=0, atol=1e-5)

    write_checkpoint(ours, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(back(text).logits, theirs(text).logits, rtol=0, atol=1e-5)
    again = load(tmp_path / "out")
    assert again.config == ours.config
    assert torch.equal(logits(again, text), logits(ours, text))


@torch.no_grad()
def test_generation(kind: str, write: Callable[..., Any], tmp_path: Path) -> None:
    theirs, prompt = write(kind, tmp_path), torch.tensor([[3, 1, 4, 1, 5, 9]])
    expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert generate(load(tmp_path), [prompt[0].tolist()], 8) == [expected[0, 6:].tolist()]


def test_bfloat16_stays(write: Callable[..., Any], tmp_path: Path) -> None:
    write("llama", tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}


def test_old_ways_of_writing_settings(write: Callable[..., Any], tmp_path: Path) -> None:
    """Files from before transformers 5 say the same in other keys."""
    text = torch.randint(61, (1, 30))
    old = {
        "llama 3.1": {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        "neox in sequence": {"rotary_pct": 0.5, "rotary_emb_base": 5000},
    }
    for kind, keys in old.items():
        write(kind, tmp_path)
        new = load(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        del config["rope_parameters"], config["dtype"]
        path.write_text(json.dumps(config | keys | {"torch_dtype": "float32"}))
        assert load(tmp_path).config == new.config
        torch.testing.assert_close(logits(load(tmp_path), text), logits(new, text))


def test_reading_needs_no_transformers(write: Callable[..., Any], tmp_path: Path) -> None:
    write("qwen3", tmp_path)
    code = (
        "import sys; sys.modules['transformers'] = None; from kvlab.methods.store import load\n"
        f"print(load({str(tmp_path)!r}).config.qk_norm)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_checkpoint_can_be_uptrained(write: Callable[..., Any], tmp_path: Path) -> None:
    write("neox", tmp_path)
    block = convert(load(tmp_path), resolve({"block_transformer": {"block_length": 2}}))
    block(torch.randint(61, (1, 8))).nll.sum().backward()


def test_what_no_architecture_can_say(tmp_path: Path) -> None:
    from kvlab.methods.decoder.config import PRESETS, DecoderConfig

    odd = DecoderConfig(vocab_size=32, **(PRESETS["nano"] | {"norm": "layer"}))
    with pytest.raises(CheckpointError, match="no Hugging Face architecture has these settings"):
        write_checkpoint(TokenModel(odd, resolve({})), tmp_path)
    nano = DecoderConfig(vocab_size=32, **PRESETS["nano"])
    block = build(nano, resolve({"block_transformer": {"block_length": 2}}))
    with pytest.raises(CheckpointError, match="BlockTransformer has no Hugging Face architecture"):
        write_checkpoint(block, tmp_path)
    assert not list(tmp_path.iterdir())
