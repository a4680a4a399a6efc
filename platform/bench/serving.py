"""Full attention through kvlab's classes in vLLM, beside vLLM's own Llama over the same weights."""

from __future__ import annotations

import random
import tempfile
from functools import partial
from pathlib import Path

import torch

from kvlab.methods.build import build
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.decoder.huggingface.writer import write_checkpoint
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line, interleaved, middle
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.serving import export
from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine

PRESET, VOCABULARY = "mini", 8192
BATCH, PROMPT, GENERATED = 16, 128, 64
WARMUP, REPEATS = 1, 7
LEAST = 0.95
POOL = 256 << 20


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Line]:
    """Two engines in one process take turns: the same weights, prompts and pool."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=VOCABULARY, **{**PRESETS[PRESET], "max_positions": 4 * PROMPT}
    )
    model = build(config, resolve({})).to(dtype)
    name = str(dtype).removeprefix("torch.")
    draw = random.Random(0)
    prompts = [[draw.randrange(1, VOCABULARY) for _ in range(PROMPT)] for _ in range(BATCH)]
    with tempfile.TemporaryDirectory() as scratch:
        own, served, llama = (Path(scratch) / part for part in ("own", "served", "llama"))
        own.mkdir()
        llama.mkdir()
        model.save(own)
        export.write(own, {}, served)
        write_checkpoint(model, llama)
        asked = (Asked(folder, POOL, options={"dtype": name}) for folder in (served, llama))
        with Engine(next(asked)) as ours, Engine(next(asked)) as theirs:
            same = [
                engine.generate(prompts, GENERATED) for engine in (ours, theirs)
            ]  # which also compiles
            mine, other = interleaved(
                partial(ours.run, prompts, GENERATED),
                partial(theirs.run, prompts, GENERATED),
                warmup=WARMUP,
                repeats=REPEATS,
            )
    pairs = [(a.ids, b.ids) for a, b in zip(*same, strict=True)]
    agree = sum(a == b for a, b in pairs) / len(pairs)
    tokens = BATCH * GENERATED
    return [
        Line(
            f"vLLM: full attention, {PRESET}, batch {BATCH}, {PROMPT} + {GENERATED} tokens",
            "tokens/s",
            tokens / middle(mine),
            tokens / middle(other),
            beside="vLLM's own Llama",
            least_ratio=LEAST,
            void="" if agree > 0.5 else "they do not generate the same tokens",
            detail={
                "paired_ratio": summarise([b / a for a, b in zip(mine, other, strict=True)]),
                "answers_that_agree": agree,
            },
        )
    ]
