"""The benchmark through vLLM's engine: the same load, and what the pool holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvlab.methods.axis import Method
from kvlab.methods.cost import cost_of
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.jobs.context import Context, Stopped
from kvlab.platform.serving import export
from kvlab.platform.serving.demand import Slots, demand_of, under
from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine, Run

SPARE = 1.1
"""How much larger than the full caches of the largest batch a pool is, where none is asked for."""


def measure(
    spec: Mapping[str, Any],
    context: Context,
    apply: Method | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Measure every batch size; see `kvlab.platform.jobs.benchmark.run`.

    All arms get a pool of as many bytes: `kv_budget`, or what the largest batch would take with the
    full cache, and a tenth.

    Returns:
        rows; engine (what vLLM really runs with); as_asked: no request took more blocks than
        predicted, and none was turned out whose answer that would change.
    """
    source = context.inputs["of"]
    canonical = {} if apply is None else apply.to_dict()
    config, trained = read_config(source), trained_method(source)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    length = spec["prompt"] + spec["generate"]
    page: dict[str, Any] = {"itemsize": itemsize, "block_size": 128, "in_flight": length}
    full = demand_of(config, {}, {}, **page)
    most = max(spec["batch"])
    pool = spec["kv_budget"] or int(SPARE * (most * full.blocks(1, length) + 1) * full.block_bytes)
    with TemporaryDirectory(prefix="kvlab-served-") as scratch:
        folder = Path(scratch) / "model"
        export.write(source, canonical, folder)
        # The same prompts come again: no arm may find them in its cache.
        options = {"dtype": str(dtype).removeprefix("torch."), "enable_prefix_caching": False}
        asked = Asked(folder, pool, length, most, spec["seed"] or 0, options)
        with Engine(asked) as engine:
            found = engine.effective()
            in_flight = found["max_num_batched_tokens"]
            given = {**page, "block_size": found["block_size"][0], "in_flight": in_flight}
            demand = demand_of(config, trained, canonical, **given)
            engine.check(demand)
            own = cost_of(config, under(trained, canonical))
            predicted = own.kv_bytes_per_token(length, itemsize, spec["prompt"])
            rows, as_asked = [], True
            for batch in spec["batch"]:
                runs = _runs(engine, spec, context, config.vocab_size, batch)
                each = demand.blocks(spec["prompt"], length)
                exact = not isinstance(demand, Slots)
                as_asked &= exact or not any(run.preemptions for run in runs)
                as_asked &= runs[-1].peak_blocks <= batch * each
                row = _row(spec, batch, runs, demand.block_bytes, each)
                rows.append({**row, **_capacity(engine, found, each, length),
                             "kv_bytes_per_token_predicted": predicted})  # fmt: skip
    return {"rows": rows, "engine": {**found, "asked_pool_bytes": pool}, "as_asked": as_asked}


def _runs(
    engine: Engine, spec: Mapping[str, Any], context: Context, vocabulary: int, batch: int
) -> list[Run]:
    found = []
    for repeat in range(-spec["warmup"], spec["repeats"]):
        if context.stopping():
            raise Stopped
        draw = torch.Generator().manual_seed((spec["seed"] or 0) * 1_000_003 + max(0, repeat))
        prompts = torch.randint(vocabulary, (batch, spec["prompt"]), generator=draw).tolist()
        run = engine.run(prompts, spec["generate"])
        if repeat >= 0:
            found.append(run)
            context.progress(repeat + 1, spec["repeats"], f"batch {batch}")
    return found


def _row(
    spec: Mapping[str, Any], batch: int, runs: list[Run], block_bytes: int, each: int
) -> dict[str, Any]:
    generated = batch * spec["generate"]
    length = spec["prompt"] + spec["generate"]
    return {
        "batch": batch,
        "prompt": spec["prompt"],
        "generate": spec["generate"],
        "time_to_first_token": summarise([run.first for run in runs]),
        "tokens_per_second": summarise([generated / run.seconds for run in runs]),
        "preemptions": runs[-1].preemptions,
        "kv_bytes": runs[-1].peak_blocks * block_bytes,
        "kv_bytes_per_token": each * block_bytes / length,
    }


def _capacity(engine: Engine, found: Mapping[str, Any], each: int, length: int) -> dict[str, float]:
    """What the pool holds: requests of this load, and vLLM's own figures for its worst case."""
    own = engine.capacity()
    return {
        "pool_bytes": found["pool_bytes"],
        "pool_requests": (found["blocks"] - 1) // each,
        "pool_tokens": (found["blocks"] - 1) // each * length,
        "vllm_requests": own["requests"],
        "vllm_tokens": own["tokens"],
    }
