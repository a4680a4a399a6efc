"""The benchmark job: prefill, decode and memory of a model, with the node to itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvlab.methods.axis import TRAIN_TIME, Method
from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.graph import capture_on
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import from_dict
from kvlab.methods.store import load as load_model
from kvlab.platform.jobs import environment, memory
from kvlab.platform.jobs.benchmark import load
from kvlab.platform.jobs.benchmark.measure import Generation, generate
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.jobs.checkpoint import trained_method
from kvlab.platform.jobs.context import Context, Stopped
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.prepared import applied

ENOUGH = 5
"""Repeats from which a median's interval is worth printing (93.75 % at five)."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Measure every batch size, and the largest batch whose cache fits `kv_budget`.

    Args:
        spec: engine ("torch", also where it is left out, or "vllm"), prompt, generate (tokens),
            batch (sizes), repeats, warmup, apply (run-time axes), kv_budget (bytes or None), dtype
            ("auto": float32 on a CPU, bfloat16 on CUDA), seed, cuda_graph (False: decode steps are
            eager; also where it is left out they are captured and replayed, on CUDA).

    Returns:
        rows (one per batch size), largest_batch (torch) or engine (what vLLM ran with), gates (all
        true: the timings count), load, settled (gates that the settings decide, for every run
        alike), environment.
        Times in seconds, rates in tokens per second, sizes in bytes.
    """
    device = environment.prepare(context, spec["seed"])
    taken, others = load.taken(device), load.before()
    during = load.Load()
    dtype = torch_dtype(spec["dtype"], device)
    if spec.get("engine") == "vllm":
        return _served(spec, context, dtype, taken, others, during)
    model = load_model(context.inputs["of"], device=str(device), dtype=dtype).eval()
    bench = Bench(model, spec, context, device)
    rows = [bench.row(batch) for batch in spec["batch"]]
    largest = None
    if spec["kv_budget"] is not None:
        largest = bench.largest(spec["kv_budget"], rows[0])
        if largest and largest not in spec["batch"]:
            rows.append(bench.row(largest))
    return {
        "rows": rows,
        "largest_batch": largest,
        **_circumstances(spec, context, bench.as_asked, (taken, others, during.cores()), dtype),
    }


def _served(
    spec: Mapping[str, Any],
    context: Context,
    dtype: torch.dtype,
    taken: int | None,
    others: float | None,
    during: load.Load,
) -> dict[str, Any]:
    """Measure through vLLM's engine, in this process."""
    from kvlab.platform.jobs.benchmark.served import measure

    span = from_dict(trained_method(context.inputs["of"])).span()
    apply = applied(spec, context, -(-spec["prompt"] // span))
    found = measure(spec, context, apply, dtype)
    as_asked = found.pop("as_asked")
    busy = (taken, others, during.cores())
    return {**found, **_circumstances(spec, context, as_asked, busy, dtype)}


def _circumstances(
    spec: Mapping[str, Any],
    context: Context,
    as_asked: bool,
    load_: tuple[int | None, float | None, float | None],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Whether the timings count, and where they were made."""
    taken, before, during = load_
    busy = [cores for cores in (before, during) if cores is not None]
    return {
        "gates": {
            "alone": bool(busy)
            and max(busy) <= load.MOST_CORES
            and (taken or 0) <= load.MOST_MEMORY,
            "repeats_enough": spec["repeats"] >= ENOUGH,
            "tokens_as_asked": as_asked,
        },
        "settled": ["repeats_enough"],
        "load": {
            "cores_of_others_before": before,
            "cores_of_others_during": during,
            "gpu_bytes_taken_before": taken,
        },
        "environment": environment.capture(context, dtype=str(dtype).removeprefix("torch.")),
    }


class Bench:
    """A model under its run-time axes, measured at one batch size after another.

    Attributes:
        as_asked: every generation so far had the tokens that were asked, and a cache as large as
            the cost model says that they need, where that does not depend on what they say.
    """

    def __init__(
        self,
        model: LanguageModel,
        spec: Mapping[str, Any],
        context: Context,
        device: torch.device,
    ) -> None:
        self.model, self.spec, self.context, self.device = model, spec, context, device
        self.apply: Method | None = None
        if spec["apply"]:
            self.apply = applied(spec, context, -(-spec["prompt"] // model.method.span()))
        self.cost = _cost(model, self.apply)
        # A block in the making is not in the cache yet.
        self.least = spec["prompt"] + spec["generate"] - model.method.span() + 1
        self.itemsize = next(model.parameters()).element_size()
        budget = None if self.apply is None else self.apply["budget"].value
        self.capture = capture_on(device) if spec.get("cuda_graph", True) else None
        self.foretold = budget is None or not budget.observes_all
        self.as_asked = True

    def once(self, batch: int, repeat: int = 0) -> Generation:
        """Generate once from random prompts; those of one repeat are the same for every arm."""
        if self.context.stopping():
            raise Stopped
        spec = self.spec
        draw = torch.Generator().manual_seed((spec["seed"] or 0) * 1_000_003 + repeat)
        shape = (batch, spec["prompt"])
        prompts = torch.randint(self.model.config.vocab_size, shape, generator=draw)
        prompts = prompts.to(self.device)
        found = generate(self.model, prompts, spec["generate"], self.apply, self.capture)
        asked = batch * (spec["prompt"] + spec["generate"])
        self.as_asked &= found.kv_tokens == asked
        self.as_asked &= found.ids.shape == (batch, spec["generate"])
        if self.foretold:
            predicted = self.cost.kv_bytes(self.least, self.itemsize, spec["prompt"])
            self.as_asked &= found.kv_bytes >= batch * predicted
        return found

    def row(self, batch: int) -> dict[str, Any]:
        """Measure one batch size."""
        spec = self.spec
        for repeat in range(spec["warmup"]):
            self.once(batch, repeat)
        peak = memory.Peak(self.device)
        found = []
        for repeat in range(spec["repeats"]):
            found.append(self.once(batch, repeat))
            self.context.progress(repeat + 1, spec["repeats"], f"batch {batch}")
        # On CUDA the allocator's peak holds the weights already.
        weights = 0 if self.device.type == "cuda" else _weight_bytes(self.model)
        generated, last = batch * spec["generate"], found[-1]
        length = spec["prompt"] + spec["generate"]
        rates = [generated / (g.first_token + g.decode) for g in found]
        decoded = batch * (spec["generate"] - 1)
        return {
            "batch": batch,
            "prompt": spec["prompt"],
            "generate": spec["generate"],
            "prefill_seconds": summarise([g.prefill for g in found]),
            "time_to_first_token": summarise([g.first_token for g in found]),
            "decode_tokens_per_second": (
                summarise([decoded / g.decode for g in found]) if decoded else None
            ),
            "tokens_per_second": summarise(rates),
            "replayed": last.replayed,
            "capture_seconds": last.captured,
            "kv_bytes": last.kv_bytes,
            "kv_tokens": last.kv_tokens,
            "kv_bytes_per_token": last.kv_bytes / last.kv_tokens,
            "kv_bytes_per_token_predicted": self.cost.kv_bytes_per_token(
                length, self.itemsize, spec["prompt"]
            ),
            "peak_memory_bytes": peak.bytes() + weights,
            "peak_memory_source": peak.source if not weights else f"weights + {peak.source}",
        }

    def largest(self, budget: int, row: Mapping[str, Any]) -> int:
        """Return the largest batch whose cache was seen to fit the budget; 0 where none does.

        It is reckoned from the bytes per sequence that were measured, no more than the memory that
        is free takes, then run: what the cache holds decides, and a batch that the device cannot
        take is lowered by a tenth.
        """
        each = row["kv_bytes"] / row["batch"]
        batch = int(min(budget, memory.free(self.device)) // each)
        while batch:
            try:
                held = self.once(batch).kv_bytes
            except (RuntimeError, MemoryError) as error:
                if not memory.exhausted(error):
                    raise
                batch = batch * 9 // 10
                continue
            if held <= budget:
                return batch
            batch -= 1
        return 0


def _cost(model: LanguageModel, apply: Method | None) -> Cost:
    choices = dict(model.method.choices)
    if apply is not None:
        choices |= {axis: c for axis, c in apply.choices.items() if axis not in TRAIN_TIME}
    return cost_of(model.config, Method(model.method.label, choices))


def _weight_bytes(model: LanguageModel) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())
