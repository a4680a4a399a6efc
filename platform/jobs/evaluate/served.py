"""Answers through vLLM's engine: what a server says, judged as what kvlab's own engine says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvlab.methods.axis import Method
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.jobs.evaluate.recall import Answering
from kvlab.platform.serving import export
from kvlab.platform.serving.demand import demand_of
from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine

SPARE = 1.1


@contextlib.contextmanager
def answering(
    source: Path, apply: Method, dtype: torch.dtype, longest: int, batch: int, seed: int | None
) -> Iterator[Answering]:
    """Start an engine over a model's folder, with room for a batch of the longest requests."""
    config, canonical = read_config(source), apply.to_dict()
    itemsize = torch.empty(0, dtype=dtype).element_size()
    given: dict[str, Any] = {"itemsize": itemsize, "block_size": 128, "in_flight": longest}
    full = demand_of(config, {}, {}, **given)
    pool = int(SPARE * (batch * full.blocks(1, longest) + 1) * full.block_bytes)
    with TemporaryDirectory(prefix="kvlab-served-") as scratch:
        folder = Path(scratch) / "model"
        export.write(source, canonical, folder)
        options: Mapping[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        with Engine(Asked(folder, pool, longest, batch, seed or 0, options)) as engine:
            demand = demand_of(config, trained_method(source), canonical, **given)
            engine.check(demand)

            def answer(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
                return [list(one.ids) for one in engine.generate(prompts, tokens)]

            yield answer
