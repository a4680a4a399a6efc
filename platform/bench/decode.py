"""Decode throughput of blocks beside tokens: equal body parameters, equal bytes for the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvlab.methods.axis import Method, resolve
from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.store import save
from kvlab.platform.bench.line import Line
from kvlab.platform.jobs.local import run_cell

VOCABULARY = 2048
SHAPES = ((128, 128), (32, 224), (224, 32))
"""Prompt and generated tokens."""
SETTINGS = {"cpu": ("micro", 16 * 2**20), "cuda": ("mini", 2 * 2**30)}
"""Per device: model preset, and bytes of the budget (on the CPU 5 sequences of full attention)."""
REPEATS = 3
EQUAL = 0.01
"""How far the body parameters may be apart, as a share."""
BLOCK = {"block_transformer": {"block_length": 4}}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Run the benchmark job on both models, each at the largest batch that the budget holds."""
    preset, budget = SETTINGS[torch.device(device).type]
    config, widened = equal_bodies(preset)
    blocks, tokens = resolve(BLOCK), resolve("full_attention")
    bodies = body(config, blocks), body(widened, tokens)
    apart = abs(bodies[0] - bodies[1]) / bodies[1]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        ours = benchmark(Path(folder) / "blocks", config, blocks, budget, device, dtype)
        theirs = benchmark(Path(folder) / "tokens", widened, tokens, budget, device, dtype)
        for prompt, generate in SHAPES:
            mine, other = ours(prompt, generate), theirs(prompt, generate)
            void = "" if apart <= EQUAL else f"body parameters are {apart:.1%} apart"
            if not (mine["gates"]["tokens_as_asked"] and other["gates"]["tokens_as_asked"]):
                void = "not every token that was asked for was generated"
            if max(mine["kv_bytes"], other["kv_bytes"]) > budget:
                void = "a cache is larger than the budget"
            lines.append(
                Line(
                    f"decode, blocks of 4, prompt {prompt} + {generate}, {budget >> 20} MiB KV",
                    "tokens/s",
                    mine["decode_tokens_per_second"]["median"],
                    other["decode_tokens_per_second"]["median"],
                    beside="full attention",
                    void=void,
                    detail={"blocks": mine, "tokens": other, "body_parameters": bodies},
                )
            )
    return lines


def equal_bodies(preset: str) -> tuple[DecoderConfig, DecoderConfig]:
    """Return the config to be split into blocks, and one with wider feed-forward layers.

    A Block Transformer has an expansion besides its layers; full attention gets as many parameters.
    """
    config = DecoderConfig(vocab_size=VOCABULARY, **PRESETS[preset])
    blocks, tokens = resolve(BLOCK), resolve("full_attention")
    wanted = body(config, blocks)
    unit = body(config.with_(ffn_width=config.ffn_width + 1), tokens) - body(config, tokens)
    missing = wanted - body(config, tokens)
    return config, config.with_(ffn_width=config.ffn_width + round(missing / unit))


def body(config: DecoderConfig, method: Method) -> int:
    return cost_of(config, method).body_parameters()


def benchmark(
    folder: Path,
    config: DecoderConfig,
    method: Method,
    budget: int,
    device: str,
    dtype: torch.dtype,
) -> Callable[[int, int], dict[str, Any]]:
    """Save a fresh model; return what measures it at its largest batch within the budget."""
    torch.manual_seed(0)
    model = folder / "model"
    model.mkdir(parents=True)
    save(build(config, method), model)

    def measure(prompt: int, generate: int) -> dict[str, Any]:
        spec = {
            "prompt": prompt,
            "generate": generate,
            "batch": [1],
            "repeats": REPEATS,
            # The search for the largest batch has warmed up already.
            "warmup": 0,
            "apply": {},
            "kv_budget": budget,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": 0,
        }
        result = run_cell(
            "benchmark",
            spec,
            {"of": model},
            folder / f"{prompt}-{generate}",
            device=device,
            threads=torch.get_num_threads(),
        )
        # The row of the largest batch follows those that were asked for.
        return {**result["rows"][-1], "gates": result["gates"]}

    return measure
