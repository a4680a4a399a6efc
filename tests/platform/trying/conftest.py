"""Tiny checkpoints as people have them: a Hugging Face folder with or without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.registry import resolve
from kvlab.platform.trying.points import Candidates
from kvlab.platform.trying.subject import read

END = "<|endoftext|>"


def write_tokenizer(folder: Path) -> None:
    """A byte for a token, and an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, **{letter: i for i, letter in enumerate(letters, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a Llama of two layers."""

    def make(name: str = "tiny", *, tokenizer: bool = True, positions: int = 256) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        config = DecoderConfig(
            vocab_size=257, max_positions=positions, **llama(32, 2, 4, 2, 48), init_std=0.3
        )
        write_checkpoint(build(config, resolve({})), folder)
        if tokenizer:
            write_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def candidates(checkpoint: Callable[..., Path]) -> Callable[..., Candidates]:
    """A function that makes the candidates of a tiny model."""

    def make(*budgets: float, prompt: int = 128, after: int = 16, **more: object) -> Candidates:
        subject = read(checkpoint(), "tiny")
        return Candidates(subject, prompt, prompt + after, budgets, 4, **more)  # type: ignore[arg-type]

    return make
