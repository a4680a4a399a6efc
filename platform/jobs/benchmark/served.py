"""The benchmark through vLLM's engine: the same load, and what the pool holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvlab.methods.axis import Method
from kvlab.methods.cost import cost_of
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.jobs.context import Context, Stopped
from kvlab.platform.serving.demand import Slots, under
from kvlab.platform.serving.opened import opened
from kvlab.platform.serving.vllm_0_32.engine import Engine, Run


def measure(
    spec: Mapping[str, Any],
    context: Context,
    apply: Method,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Measure every batch size; see `kvlab.platform.jobs.benchmark.run`.

    All arms get a pool of as many bytes: `kv_budget`, or what the largest batch would take with the
    full cache, and a tenth.

    Returns:
        rows; engine (what vLLM really runs with); as_asked: no request took more blocks than
        predicted, and none was turned out whose answer that would change.
    """
    source, length = context.inputs["of"], spec["prompt"] + spec["generate"]
    config = read_config(source)
    own = cost_of(config, under(trained_method(source), apply.to_dict()))
    predicted = own.kv_bytes_per_token(length, dtype.itemsize, spec["prompt"])
    rows, as_asked = [], True
    with opened(
        source,
        apply,
        dtype,
        longest=length,
        requests=max(spec["batch"]),
        seed=spec["seed"] or 0,
        pool=spec["kv_budget"],
    ) as found:
        engine, demand = found.engine, found.demand
        each = demand.blocks(spec["prompt"], length)
        for batch in spec["batch"]:
            runs = _runs(engine, spec, context, config.vocab_size, batch)
            exact = not isinstance(demand, Slots)
            as_asked &= exact or not any(run.preemptions for run in runs)
            as_asked &= runs[-1].peak_blocks <= batch * each
            row = _row(spec, batch, runs, demand.block_bytes, each)
            capacity = _capacity(engine, found.effective, each, length)
            rows.append({**row, **capacity, "kv_bytes_per_token_predicted": predicted})
        effective = {**found.effective, "asked_pool_bytes": found.pool}
    return {"rows": rows, "engine": effective, "as_asked": as_asked}


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
