"""Bytes of the live cache beside the formula that `kvlab plan` predicts them with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvlab.methods.axis import MethodError
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

SHARE = 0.25
ALONE = frozenset({"squeeze_attention", "global_topk"})
"""Budgets that each prompt divides in its own way: the formula is of one, a batch holds for every
layer the most that one of its prompts wants."""
CUT = 15
"""Tokens generated after a prompt that was cut."""
EVICTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full attention", {"full_attention": {}}),
    ("sliding window", {"sliding_window": {}}),
    ("StreamingLLM", {"streaming_llm": {}}),
    ("H2O", {"h2o": {}}),
    ("SnapKV", {"snapkv": {}}),
    ("observed attention", {"observed_attention": {}}),
)
BUDGETS: tuple[dict[str, Any], ...] = (
    {"uniform": {"share": SHARE}},
    {"squeeze_attention": {"share": SHARE}},
    {"pyramidkv": {"share": SHARE}},
    {"per_layer": {"shares": [0.5, 0.3, 0.25, 0.2, 0.15, 0.1]}},
    {"global_topk": {"share": SHARE}},
)
PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {"int8": {}},
    {"fp8": {}},
    {"kivi": {"bits": 4, "residual": 32, "group": 16}},
    {"kivi": {"bits": 2, "residual": 32, "group": 16}},
)
"""KIVI keeps few recent rows as they are here: with its 128 so small a cache has no others."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Compare after a generation, batch and positions included, for every cache there is."""
    config = DecoderConfig(vocab_size=VOCABULARY, **PRESETS["micro"])
    lines = []
    for name, trained, applied in METHODS:
        measured, predicted = bytes_of(config, trained, applied, device, dtype)
        lines.append(line_of(name, {"only": (measured, predicted)}, dtype))
    for name, eviction in EVICTIONS:
        found = {
            label: bytes_of(
                config,
                {},
                applied,
                device,
                dtype,
                generate=CUT,
                batch=BATCH if ALONE.isdisjoint(applied) else 1,
            )
            for label, applied in combinations(eviction)
        }
        lines.append(line_of(f"{name}, {len(found)} budgets x precisions", found, dtype))
    return lines


def combinations(eviction: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every budget x precision that goes with the eviction, and what to call it."""
    for budget in BUDGETS if "full_attention" not in eviction else ({},):
        for precision in PRECISIONS:
            applied = {**eviction, **budget, **precision}
            try:
                resolve(applied)
            except MethodError:
                continue
            bits = [f"{n} {p['bits']} bit" if p else n for n, p in precision.items()]
            yield " + ".join((*budget, *bits)) or "as it is", applied


def line_of(name: str, found: dict[str, tuple[int, int]], dtype: torch.dtype) -> Line:
    """The line of the worst of them."""
    errors = {
        label: abs(measured - predicted) / predicted * 100
        for label, (measured, predicted) in found.items()
    }
    return Line(
        f"KV bytes, measured against predicted: {name}",
        "% off",
        max(errors.values()),
        better="less",
        limit=TOLERANCE_PERCENT,
        detail={
            "measured_and_predicted_bytes": found,
            "percent_off": errors,
            "dtype": str(dtype),
        },
    )


def bytes_of(
    config: DecoderConfig,
    trained: dict[str, Any],
    applied: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    *,
    generate: int | None = None,
    batch: int | None = None,
) -> tuple[int, int]:
    """Generate with a fresh model; return its cache's bytes, and those predicted."""
    torch.manual_seed(0)
    generate, batch = generate or GENERATE, batch or BATCH
    method, run_time = resolve(trained), resolve(applied)
    model = build(config, method).to(device, dtype).eval()
    ids = torch.randint(config.vocab_size, (batch, PROMPT), device=device)
    session = model.start(ids, new_tokens=generate, apply=run_time)
    for _ in range(generate):
        session.step(session.logits.argmax(-1))
    cost = cost_of(config, resolve({**trained, **applied}))
    predicted = cost.kv_bytes(PROMPT + generate, dtype.itemsize, PROMPT)
    return session.kv_bytes(), batch * predicted
