"""Benchmarks: what is timed, what the cache holds, and when a number does not count."""

import json
import math
import os
import random
import time

import pytest
import torch

from kvlab.methods.store import load
from kvlab.platform.jobs import memory
from kvlab.platform.jobs.benchmark.load import Counted, Load, others
from kvlab.platform.jobs.benchmark.measure import generate
from kvlab.platform.jobs.benchmark.median import summarise
from kvlab.platform.jobs.benchmark.run import Bench
from kvlab.platform.jobs.context import Stopped
from kvlab.platform.jobs.local import LocalContext, run_cell

SPEC = {
    "prompt": 9, "generate": 7, "batch": [1, 3], "repeats": 5, "warmup": 1, "apply": {},
    "kv_budget": None, "dtype": "auto", "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def blocks(data, train_spec, base, block, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    spec = {**train_spec(method=block(4), tokens=128), "lora": None, "distill": None}
    run_cell("uptrain", spec, {"data": data, "from": base}, folder)
    return folder


def bench(model, folder, context=(), **changes):
    return run_cell("benchmark", {**SPEC, **changes}, {"of": model}, folder, **dict(context))


def test_a_row_holds_what_was_measured(base, tmp_path):
    result = bench(base, tmp_path)
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["kv_tokens"] == row["batch"] * 16
        for name in ("prefill_seconds", "time_to_first_token", "decode_tokens_per_second"):
            timing = row[name]
            assert len(timing["samples"]) == 5
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert row["time_to_first_token"]["median"] >= row["prefill_seconds"]["median"]
        # The whole is the first token, prefill included, and then the decoding.
        for first, decoded, whole in zip(
            row["time_to_first_token"]["samples"],
            row["decode_tokens_per_second"]["samples"],
            row["tokens_per_second"]["samples"],
            strict=True,
        ):
            seconds = first + row["batch"] * 6 / decoded
            assert row["batch"] * 7 / whole == pytest.approx(seconds)
        assert row["peak_memory_bytes"] >= sum(p.numel() for p in load(base).parameters()) * 4
    assert result["gates"]["repeats_enough"]
    assert result["gates"]["tokens_as_asked"]
    assert result["environment"]["dtype"] == "float32"
    assert result["environment"]["threads"] == 1
    assert json.dumps(result)


@pytest.mark.parametrize("arm", ["base", "blocks"])
@pytest.mark.parametrize("apply", [{}, {"eviction": {"sliding_window": {"window": 8}}}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_what_the_formula_says(arm, apply, dtype, tmp_path, request):
    folder = request.getfixturevalue(arm)
    sizes = {"prompt": 200, "generate": 56, "batch": [2], "repeats": 1, "warmup": 0}
    result = bench(folder, tmp_path, apply=apply, dtype=dtype, **sizes)
    (row,) = result["rows"]
    assert row["kv_bytes_per_token"] == row["kv_bytes"] / row["kv_tokens"]
    # Beside the rows stands a table of 8-byte positions, which all layers share here.
    positions = 256 if arm == "base" else 256 // 4
    table = 2 * 8 * (min(8, positions) if apply else positions)
    assert row["kv_bytes"] == row["kv_bytes_per_token_predicted"] * 512 + table
    assert not result["gates"]["repeats_enough"]


@pytest.mark.parametrize("arm", ["base", "blocks"])
@pytest.mark.parametrize("sizes", [(9, 7), (8, 7), (9, 8), (3, 2), (1, 1)])
def test_a_cache_that_keeps_less_than_its_cost_closes_the_gate(arm, sizes, tmp_path, request):
    folder = request.getfixturevalue(arm)
    spec = {**SPEC, "prompt": sizes[0], "generate": sizes[1]}
    context = LocalContext(folder=tmp_path)
    plain = Bench(load(folder), spec, context, torch.device("cpu"))
    plain.once(2)
    assert plain.as_asked
    window = {"eviction": {"sliding_window": {"window": 2}}}
    spec |= {"apply": window, "prompt": 40, "generate": 8}
    less = Bench(load(folder), spec, context, torch.device("cpu"))
    less.once(2)
    assert less.as_asked
    less.cost = plain.cost
    less.once(2)
    assert not less.as_asked


def test_the_largest_batch_within_a_budget_is_seen_to_fit(base, tmp_path):
    one = bench(base, tmp_path, batch=[1], repeats=1)["rows"][0]["kv_bytes"]
    result = bench(base, tmp_path, batch=[1], repeats=1, kv_budget=5 * one + one // 2)
    assert result["largest_batch"] == 5
    assert result["rows"][-1]["batch"] == 5
    assert result["rows"][-1]["kv_bytes"] <= 5 * one + one // 2
    none = bench(base, tmp_path, batch=[1], repeats=1, kv_budget=one // 2)
    assert none["largest_batch"] == 0
    assert len(none["rows"]) == 1


def test_one_token_has_no_decode_rate(base, tmp_path):
    (row,) = bench(base, tmp_path, generate=1, batch=[2], repeats=1)["rows"]
    assert row["decode_tokens_per_second"] is None
    assert row["tokens_per_second"]["median"] > 0


def test_what_is_timed_is_greedy_generation(base):
    model = load(base)
    prompts = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    ids = prompts
    for _ in range(7):
        session = model.start(ids, new_tokens=1)
        ids = torch.cat((ids, session.logits.argmax(-1, keepdim=True)), dim=1)
    found = generate(model, prompts, 7, None)
    assert found.ids.equal(ids[:, 9:])
    assert 0 < found.prefill <= found.first_token
    assert found.decode > 0


@pytest.mark.parametrize(("arm", "asked"), [("base", 33), ("blocks", 41), ("base", 1)])
def test_what_was_replayed_is_said_and_captures_are_not_timed(
    arm, asked, request, emulated, monkeypatch
):
    model = load(request.getfixturevalue(arm))
    prompts = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    clock = {"now": 0.0, "captures": 0}

    def capture(action):
        clock["now"] += 1000.0
        clock["captures"] += 1
        return emulated(action)

    for module in ("platform.jobs.benchmark.measure.time", "methods.decoder.graph"):
        monkeypatch.setattr(f"kvlab.{module}.perf_counter", lambda: tick(clock))
    found = generate(model, prompts, asked, None, capture)
    eager = generate(model, prompts, asked, None)
    assert found.ids.equal(eager.ids)
    assert (found.kv_bytes, found.kv_tokens) == (eager.kv_bytes, eager.kv_tokens)
    if asked == 1:
        assert (found.replayed, eager.replayed, clock["captures"]) == (None, None, 0)
        return
    period = 1 if arm == "base" else 4
    assert found.replayed == (asked - 1 - period) / (asked - 1)
    assert (eager.replayed, eager.captured, clock["captures"]) == (0.0, 0.0, 1)
    assert 1000 < found.captured < 1010
    assert 0 < found.decode < 10


def tick(clock):
    """A clock that moves by a little each time it is read."""
    clock["now"] += 1.0
    return clock["now"]


def test_only_what_asks_for_no_graphs_has_none(base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "kvlab.platform.jobs.benchmark.run.capture_on", lambda device: asked.append(device)
    )
    (row,) = bench(base, tmp_path, batch=[1], repeats=1, cuda_graph=False)["rows"]
    assert (row["replayed"], row["capture_seconds"], asked) == (0.0, 0.0, [])
    (row,) = bench(base, tmp_path, batch=[1], repeats=1)["rows"]
    assert (row["replayed"], len(asked)) == (0.0, 1)


def test_a_benchmark_stops_between_generations(base, tmp_path):
    with pytest.raises(Stopped):
        bench(base, tmp_path, {"stop_after": 3})


def test_the_interval_covers_the_median_as_often_as_it_says():
    draw = random.Random(0)
    for n in (5, 6, 9, 20):
        hits = 0
        for _ in range(2000):
            found = summarise([draw.expovariate(1.0) for _ in range(n)])
            hits += found["low"] <= math.log(2) <= found["high"]
        assert hits / 2000 == pytest.approx(found["coverage"], abs=0.02)
        assert found["coverage"] >= (0.95 if n >= 6 else 0.93)
    assert summarise([2.0]) == {
        "median": 2.0, "low": 2.0, "high": 2.0, "coverage": 0.0, "samples": [2.0],
    }  # fmt: skip


def test_the_peak_sees_memory_that_was_given_back():
    peak = memory.Peak(torch.device("cpu"))
    block = torch.ones(50_000_000, dtype=torch.uint8)
    del block
    assert 45e6 < peak.bytes() < 80e6
    assert memory.Peak(torch.device("cpu")).bytes() < 20e6


def test_work_of_this_process_is_not_the_load_of_others():
    begun = Counted(busy=100.0, own=10.0, wall=50.0)
    assert others(begun, Counted(busy=108.0, own=18.0, wall=54.0)) == 0.0
    assert others(begun, Counted(busy=110.0, own=18.0, wall=54.0)) == 0.5
    assert others(begun, begun) == 0.0


def test_the_load_of_others_is_at_most_what_the_machine_has():
    load_ = Load()
    begun = time.process_time()
    while time.process_time() - begun < 0.2:
        pass
    cores = load_.cores()
    assert cores is not None
    assert 0 <= cores <= os.cpu_count()


def test_memory_at_its_end_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert memory.exhausted(error.value)
    assert memory.exhausted(torch.OutOfMemoryError())
    assert not memory.exhausted(RuntimeError("shapes do not match"))
    assert 0 < memory.free(torch.device("cpu")) < 1 << 50


def test_a_budget_beyond_the_memory_there_is_ends_at_what_fits(base, tmp_path, monkeypatch):
    one = bench(base, tmp_path, batch=[1], repeats=1)["rows"][0]["kv_bytes"]
    monkeypatch.setattr(memory, "free", lambda device: 3 * one)
    assert bench(base, tmp_path, batch=[1], repeats=1, kv_budget=1 << 60)["largest_batch"] == 3
