"""Decode throughput of blocks beside tokens: equal body parameters, equal bytes for the cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from kvlab.methods.axis import Method
from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.registry import resolve
from kvlab.methods.store import save
from kvlab.platform.bench.line import Line
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.jobs.local import run_cell

VOCABULARY = 2048
SHAPES = ((128, 128), (32, 224), (224, 32))
"""Prompt and generated tokens."""
SETTINGS = {"cpu": ("micro", 16 * 2**20), "cuda": ("mini", 2 * 2**30)}
"""Per device: model preset, and bytes of the budget (on the CPU 5 sequences of full attention)."""
REPEATS = 5
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
        sides = (
            Side(Path(folder) / "blocks", config, blocks, device, dtype),
            Side(Path(folder) / "tokens", widened, tokens, device, dtype),
        )
        for prompt, generate in SHAPES:
            mine, other = in_turn(sides, prompt, generate, budget)
            void = "" if apart <= EQUAL else f"body parameters are {apart:.1%} apart"
            if not (mine["tokens_as_asked"] and other["tokens_as_asked"]):
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


class Side:
    """One model of the comparison, saved, and measured through the benchmark job."""

    def __init__(
        self, folder: Path, config: DecoderConfig, method: Method, device: str, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.folder, self.device, self.dtype = folder, device, dtype
        self.model = folder / "model"
        self.model.mkdir(parents=True)
        save(build(config, method), self.model)

    def largest(self, prompt: int, generate: int, budget: int) -> int:
        """Return the largest batch within the budget; running it warms up, too."""
        found = self._run(prompt, generate, batch=1, budget=budget)["largest_batch"]
        return int(found)

    def once(self, prompt: int, generate: int, batch: int) -> dict[str, Any]:
        """Return the row of one generation, its gates beside it."""
        result = self._run(prompt, generate, batch=batch, budget=None)
        return {**result["rows"][0], "gates": result["gates"]}

    def _run(self, prompt: int, generate: int, *, batch: int, budget: int | None) -> dict[str, Any]:
        spec = {
            "prompt": prompt,
            "generate": generate,
            "batch": [batch],
            "repeats": 1,
            "warmup": 1,
            "apply": {},
            "kv_budget": budget,
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": 0,
        }
        return run_cell(
            "benchmark",
            spec,
            {"of": self.model},
            self.folder / f"{prompt}-{generate}",
            device=self.device,
            threads=torch.get_num_threads(),
        )


def in_turn(
    sides: tuple[Side, Side], prompt: int, generate: int, budget: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure both sides at their largest batches, turn by turn: a slow spell hits both.

    Returns:
        For each side the batch, the bytes of its cache, and the median and samples of its decode
        throughput.
    """
    batches = [side.largest(prompt, generate, budget) for side in sides]
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _ in range(REPEATS):
        for side, batch, found in zip(sides, batches, rows, strict=True):
            found.append(side.once(prompt, generate, batch))
    return _pooled(rows[0]), _pooled(rows[1])


def _pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "batch": rows[0]["batch"],
        "kv_bytes": max(row["kv_bytes"] for row in rows),
        "decode_tokens_per_second": summarise(
            [row["decode_tokens_per_second"]["median"] for row in rows]
        ),
        "tokens_as_asked": all(row["gates"]["tokens_as_asked"] for row in rows),
    }
