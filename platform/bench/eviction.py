"""Decoding at a long context under every eviction, beside full attention on the same model."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.build import build
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.model import LanguageModel, Session
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line, middle, seconds
from kvlab.platform.bench.sharing import go_on, settle
from kvlab.platform.jobs.benchmark.median import summarise

VOCABULARY = 2048
PRESET = "mini"
PROMPT = 2048
BATCHES = (1, 8)
SHARE = 0.2
STEPS = 16
"""Of a round."""
WARMUP, REPEATS = 1, 7

POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sliding window", {"sliding_window": {}}),
    ("StreamingLLM", {"streaming_llm": {}}),
    ("H2O", {"h2o": {}}),
    ("SnapKV", {"snapkv": {}}),
    ("H2O + SqueezeAttention", {"h2o": {}, "squeeze_attention": {}}),
    ("SnapKV + PyramidKV", {"snapkv": {}, "pyramidkv": {}}),
    ("sliding window + KIVI 4 bit", {"sliding_window": {}, "kivi": {"bits": 4}}),
)
"""What is applied; each keeps SHARE of the prompt."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Take turns: a round of steps of each, full attention among them, over equal contexts."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=VOCABULARY, **{**PRESETS[PRESET], "max_positions": 2 * PROMPT}
    )
    model = build(config, resolve({})).to(device, dtype).eval()
    return [line for batch in BATCHES for line in decode(model, batch, device)]


def decode(model: LanguageModel, batch: int, device: str) -> list[Line]:
    """Compare what a generated token takes: a line for each policy."""
    prompts = torch.randint(VOCABULARY, (batch, PROMPT), device=device)
    full, whole = opened(model, prompts, {})
    cut = [opened(model, prompts, kept(written)) for _, written in POLICIES]
    sessions = [full, *(session for session, _ in cut)]
    rounds = [
        [seconds(partial(go_on, session, STEPS)) for session in sessions]
        for _ in range(WARMUP + REPEATS)
    ]
    other, *each = (list(column) for column in zip(*rounds[WARMUP:], strict=True))
    return [
        Line(
            f"decode, batch {batch}, {PROMPT} tokens, {SHARE:.0%} kept: {name}",
            "tokens/s",
            batch * STEPS / middle(mine),
            batch * STEPS / middle(other),
            beside="full attention",
            detail={
                "paired_ratio": summarise([b / a for a, b in zip(mine, other, strict=True)]),
                "applied": kept(written),
                "kv_bytes": session.kv_bytes(),
                "their_kv_bytes": full.kv_bytes(),
                "prefill_seconds_once": prefill,
                "their_prefill_seconds_once": whole,
            },
        )
        for (name, written), (session, prefill), mine in zip(POLICIES, cut, each, strict=True)
    ]


def opened(model: LanguageModel, prompts: Tensor, written: dict[str, Any]) -> tuple[Session, float]:
    """Prefill; return the session and the seconds it took, once."""
    start = perf_counter()
    session = model.start(prompts, new_tokens=STEPS * (WARMUP + REPEATS), apply=resolve(written))
    settle(prompts)
    return session, perf_counter() - start


def kept(written: dict[str, Any]) -> dict[str, Any]:
    """The same with the share of this bench under its budget."""
    budget = next((n for n in ("squeeze_attention", "pyramidkv") if n in written), "uniform")
    return {**written, budget: {"share": SHARE}}
