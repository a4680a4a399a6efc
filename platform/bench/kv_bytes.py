"""Bytes of the live cache beside the formula that `kvlab plan` predicts them with."""

from __future__ import annotations

from typing import Any

import torch

from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line

VOCABULARY = 2048
BATCH = 4
PROMPT = 448
GENERATE = 63
TOLERANCE_PERCENT = 2.0

METHODS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("full attention", {}, {}),
    ("sliding window 128", {}, {"sliding_window": {"window": 128}}),
    ("blocks of 2", {"block_transformer": {"block_length": 2}}, {}),
    ("blocks of 4", {"block_transformer": {"block_length": 4}}, {}),
    ("sandwich_top, 3 KV layers", {"lckv": {"warmup_layers": 2}}, {}),
    ("yoco, window 128", {"yoco": {"window": 128}}, {}),
    ("2 KV heads of 8", {"gqa": {"kv_heads": 2}}, {}),
)


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Compare after a generation, batch and positions included, for every cache there is."""
    config = DecoderConfig(vocab_size=VOCABULARY, **PRESETS["micro"])
    lines = []
    for name, trained, applied in METHODS:
        measured, predicted = bytes_of(config, trained, applied, device, dtype)
        error = abs(measured - predicted) / predicted * 100
        tokens = BATCH * (PROMPT + GENERATE)
        lines.append(
            Line(
                f"KV bytes, measured against predicted: {name}",
                "% off",
                error,
                better="less",
                limit=TOLERANCE_PERCENT,
                detail={
                    "measured_bytes": measured,
                    "predicted_bytes": predicted,
                    "measured_bytes_per_token": measured / tokens,
                    "dtype": str(dtype),
                },
            )
        )
    return lines


def bytes_of(
    config: DecoderConfig,
    trained: dict[str, Any],
    applied: dict[str, Any],
    device: str,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Generate with a fresh model; return its cache's bytes, and those predicted."""
    torch.manual_seed(0)
    method, run_time = resolve(trained), resolve(applied)
    model = build(config, method).to(device, dtype).eval()
    ids = torch.randint(config.vocab_size, (BATCH, PROMPT), device=device)
    session = model.start(ids, new_tokens=GENERATE, apply=run_time)
    for _ in range(GENERATE):
        session.step(session.logits.argmax(-1))
    whole = resolve({**trained, **applied})
    predicted = cost_of(config, whole).kv_bytes(PROMPT + GENERATE, dtype.itemsize)
    return session.kv_bytes(), BATCH * predicted
