"""Layers that share keys and values: decode beside full attention, early exit beside all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.model import LanguageModel, Session
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line, hundredths, interleaved, middle, not_slower
from kvlab.platform.jobs.benchmark.median import summarise

VOCABULARY = 2048
SIZES = llama(256, 12, 8, 8, 704, tie_embeddings=True, init_std=0.06)
HALF = 6
"""KV layers of every map: half the layers."""
BOTTOM = ("pizza_bottom", "sandwich_bottom", "lasagna_bottom")
BATCHES = (1, 8)
PROMPT, GENERATE = 64, 32
LONG_PROMPT, ROWS = 512, 4
WARMUP, REPEATS = 1, 9
WITHIN = 0.20
"""How far early exit may be from what the cost model says, as a share."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Time both sides turn by turn, on untrained models: speed does not depend on the weights."""
    config = DecoderConfig(vocab_size=VOCABULARY, **SIZES)
    full = fresh(config, resolve({}), device, dtype)
    lines = []
    for layout in BOTTOM:
        shared = fresh(config, bottom(layout), device, dtype)
        lines += [decode(layout, shared, full, batch, device) for batch in BATCHES]
    return [*lines, early_exit(config, device, dtype)]


def bottom(layout: str) -> Method:
    return resolve({"cross_layer": {"layout": layout, "kv_layers": HALF}})


def fresh(config: DecoderConfig, method: Method, device: str, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    return build(config, method).to(device, dtype).eval()


def decode(
    layout: str, shared: LanguageModel, full: LanguageModel, batch: int, device: str
) -> Line:
    """Compare what a generated token takes, over contexts that grow alike."""
    prompts = torch.randint(VOCABULARY, (batch, PROMPT), device=device)
    sessions = [
        model.start(prompts, new_tokens=GENERATE * (WARMUP + REPEATS)) for model in (shared, full)
    ]
    mine, other = interleaved(
        lambda: go_on(sessions[0], GENERATE),
        lambda: go_on(sessions[1], GENERATE),
        warmup=WARMUP,
        repeats=REPEATS,
    )
    found = summarise([b / a for a, b in zip(mine, other, strict=True)])
    tokens = batch * GENERATE
    return Line(
        f"decode, batch {batch}: {layout}, {HALF} of 12 KV layers",
        "tokens/s",
        tokens / middle(mine),
        tokens / middle(other),
        beside="full attention",
        least_ratio=not_slower(mine, other),
        detail={"seconds": mine, "their_seconds": other, "paired_ratio": found},
    )


def go_on(session: Session, steps: int) -> None:
    """Generate so many tokens more, greedily, and wait for them."""
    for _ in range(steps):
        session.step(session.logits.argmax(-1))
    settle(session.logits)


def early_exit(config: DecoderConfig, device: str, dtype: torch.dtype) -> Line:
    """Compare one model's prefill with itself, all rows through all layers."""
    trained: dict[str, Any] = {"cross_layer": {"layout": "pizza_bottom", "kv_layers": HALF}}
    ways = [resolve({"prefill": {"early_exit": exits}}) for exits in (True, False)]
    model = fresh(config, resolve(trained), device, dtype)
    prompts = torch.randint(VOCABULARY, (ROWS, LONG_PROMPT), device=device)

    def prefill(way: Method) -> None:
        model.start(prompts, new_tokens=1, apply=way)
        settle(prompts)

    mine, other = interleaved(
        lambda: prefill(ways[0]), lambda: prefill(ways[1]), warmup=WARMUP, repeats=REPEATS
    )
    predicted = [
        cost_of(config, resolve({**trained, "prefill": {"early_exit": exits}})).prefill_flops(
            LONG_PROMPT
        )
        for exits in (True, False)
    ]
    expected = predicted[1] / predicted[0]
    return Line(
        f"prefill of {ROWS} x {LONG_PROMPT}, pizza_bottom, early exit ({expected:.2f}x in FLOPs)",
        "tokens/s",
        ROWS * LONG_PROMPT / middle(mine),
        ROWS * LONG_PROMPT / middle(other),
        beside="all rows through all layers",
        least_ratio=hundredths((1 - WITHIN) * expected),
        detail={"seconds": mine, "their_seconds": other, "predicted_flops": predicted},
    )


def settle(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
