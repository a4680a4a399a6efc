"""Decoding under ADORE for several R, beside full attention and H2O on the same model.

What a rebuilt row costs, held to what the cost model says of it. Nothing is learned here: time does
not depend on what a controller says.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve
from kvlab.platform.bench import eviction as long
from kvlab.platform.bench.line import Line, middle, seconds
from kvlab.platform.bench.sharing import go_on
from kvlab.platform.jobs.benchmark.median import summarise

KEPT = 192
"""m, the value that readers of the paper report."""
REBUILT = (0, 1, 2, 4, 8, 16)


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Take turns: a round of steps of each, over equal contexts."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=long.VOCABULARY, **{**PRESETS[long.PRESET], "max_positions": 2 * long.PROMPT}
    )
    model = build(config, resolve({})).to(device, dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        Controller(ControllerConfig(config.vocab_size, config.width)).save(Path(folder))
        return [line for batch in long.BATCHES for line in decode(model, batch, device, folder)]


def decode(model: LanguageModel, batch: int, device: str, controller: str) -> list[Line]:
    """Compare what a generated token takes: a line for each R, for fetched rows, and for H2O."""
    own = {"controller": controller}
    kept = {"uniform": {"tokens": KEPT}}
    applied: dict[str, dict[str, Any]] = {
        **{f"R = {r}": {"adore": {**own, "rebuild": r}, **kept} for r in REBUILT},
        "R = 8, offloaded": {"adore": {**own, "rebuild": 8, "source": "offload"}, **kept},
        "H2O, m + 8 rows": {"h2o": {}, "uniform": {"tokens": KEPT + 8}},
    }
    prompts = torch.randint(long.VOCABULARY, (batch, long.PROMPT), device=device)
    full, _ = long.opened(model, prompts, {})
    cut = [long.opened(model, prompts, written)[0] for written in applied.values()]
    rounds = [
        [seconds(partial(go_on, session, long.STEPS)) for session in (full, *cut)]
        for _ in range(long.WARMUP + long.REPEATS)
    ]
    other, *each = (list(column) for column in zip(*rounds[long.WARMUP :], strict=True))
    flops = {name: step_flops(model, written) for name, written in {**applied, "": {}}.items()}
    return [
        Line(
            f"decode, batch {batch}, {long.PROMPT} tokens, ADORE keeps {KEPT}: {name}",
            "tokens/s",
            batch * long.STEPS / middle(mine),
            batch * long.STEPS / middle(other),
            beside="full attention",
            detail={
                "paired_ratio": summarise([b / a for a, b in zip(mine, other, strict=True)]),
                "predicted_ratio_of_flops": flops[""] / flops[name],
                "kv_bytes": session.kv_bytes(),
                "their_kv_bytes": full.kv_bytes(),
            },
        )
        for (name, session), mine in zip(zip(applied, cut, strict=True), each, strict=True)
    ]


def step_flops(model: LanguageModel, written: dict[str, Any]) -> float:
    """FLOPs of a decode step after the prompt, as the cost model says."""
    return cost_of(model.config, resolve(written)).decode_flops(long.PROMPT + 1, long.PROMPT)
