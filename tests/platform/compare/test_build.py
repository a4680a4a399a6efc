"""Arms, settings, costs and validity of comparisons built from stored workflows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvlab.db.states import Cause, JobState
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.model import Comparison, Number
from kvlab.platform.compare.sheets import main_sheet

WINDOW = {"eviction": {"sliding_window": {"window": 64}}}


def built(lab: Any, **report: Any) -> Comparison:
    return compare(lab.load(lab.save(report or None)))


def headline(comparison: Comparison, arm: str, metric: str) -> Number:
    column = comparison.headline(metric)
    assert column is not None
    return comparison.arm(arm).number(column.id)


def test_the_quickstart_has_one_arm_per_method(quickstart: Any) -> None:
    comparison = built(quickstart)
    names = ["base", "block[block_length=2]", "block[block_length=4]"]
    assert [arm.id for arm in comparison.arms] == names
    assert [arm.against for arm in comparison.arms] == [None, "base", "base"]
    assert comparison.arm(names[2]).method == "block_transformer(block_length=4)"
    perplexity = headline(comparison, names[1], "perplexity")
    assert (len(perplexity.seeds), perplexity.expected) == (3, 3)
    assert perplexity.change is not None
    assert perplexity.change.verdict == "worse"
    assert perplexity.change.basis == "paired over 3 seeds and 40 windows"
    kv = headline(comparison, names[2], "kv_bytes_per_token")
    assert kv.change is not None
    assert (kv.value, kv.change.ratio, kv.change.verdict) == (1024.0, 0.25, "better")
    assert comparison.front is not None
    assert comparison.front.members == tuple(names)
    assert comparison.notes == ()


def test_the_headline_batch_is_the_largest_that_all_have(lab: Any) -> None:
    base, other = lab.train("base", 0), lab.train("other", 0)
    lab.benchmark(base, 100, batches=(1, 8, 32))
    lab.benchmark(other, 100, batches=(1, 8))
    comparison = built(lab)
    column = comparison.headline("tokens_per_second")
    assert column is not None
    assert column.batch == 8
    at_32 = comparison.arm("other").number("tokens_per_second[speed,batch=32]")
    assert at_32.missing == "not measured"


def test_costs_count_every_training_before_once(lab: Any) -> None:
    base = lab.train("base", 0, seconds=60)
    middle = lab.train("middle", 0, start=base, seconds=20)
    last = lab.train("last", 0, start=middle, seconds=5)
    teacher = next(row for row in lab.jobs if row.name == last)
    teacher.parents["teacher"] = base  # type: ignore[index]
    for model in (base, middle, last):
        lab.evaluate(model, 3.5)
    cost = built(lab).arm("last").cost
    assert cost is not None
    assert (cost.seconds, cost.inherited_seconds) == (5, 80)
    assert cost.inherited_flops == pytest.approx(80e10)
    assert not cost.checkpoint


def test_what_a_checkpoint_cost_is_not_known(lab: Any) -> None:
    base = lab.train("base", 0, checkpoint=True)
    up = lab.train("up", 0, start=base)
    lab.evaluate(up, 3.5)
    cost = built(lab).arm("up").cost
    assert cost is not None
    assert cost.checkpoint


def test_run_time_choices_are_arms_of_one_model(lab: Any) -> None:
    for seed in (0, 1):
        base = lab.train("base", seed)
        for apply, loss in (({}, 3.5), (WINDOW, 3.6)):
            lab.evaluate(base, loss + seed * 0.01, apply=apply)
            lab.benchmark(base, 100, apply=apply)
    comparison = built(lab)
    assert [arm.id for arm in comparison.arms] == ["base", "base + sliding_window(window=64)"]
    applied = comparison.arms[1]
    assert applied.against == "base"
    assert applied.models == comparison.arms[0].models
    change = headline(comparison, applied.id, "perplexity").change
    assert change is not None
    assert change.verdict == "worse"


def test_other_targets_never_share_a_column(lab: Any) -> None:
    base, other = lab.train("base", 0), lab.train("other", 0)
    lab.evaluate(base, 3.5, targets="aa")
    lab.evaluate(other, 3.4, targets="bb")
    comparison = built(lab)
    assert [s.id for s in comparison.settings] == ["quality", "quality/2"]
    assert comparison.arm("base").number("perplexity[quality]").value is not None
    assert comparison.arm("base").number("perplexity[quality/2]").value is None
    number = comparison.arm("other").number("perplexity[quality/2]")
    assert number.value is not None
    assert number.change is None
    assert any("never compared" in note for note in comparison.notes)


def test_other_devices_and_loads_never_share_a_column(lab: Any) -> None:
    base = lab.train("base", 0)
    other = lab.train("other", 0)
    lab.benchmark(base, 100)
    elsewhere = {"device": "cuda:0", "device_name": "Test GPU", "threads": 2, "dtype": "bfloat16"}
    lab.benchmark(other, 9000, environment=elsewhere)
    lab.benchmark(base, 80, job="long", prompt=224, generate=32)
    comparison = built(lab)
    assert [s.id for s in comparison.settings] == ["speed", "speed/2", "long"]
    fast = comparison.arm("other").number("tokens_per_second[speed/2,batch=32]")
    assert fast.value is not None
    assert fast.change is None
    assert any("different devices" in note for note in comparison.notes)


def test_a_closed_timing_gate_voids_times_but_not_bytes(lab: Any) -> None:
    base = lab.train("base", 0)
    lab.evaluate(base, 3.5)
    lab.benchmark(base, 100, gates={"alone": False})
    comparison = built(lab)
    speed = headline(comparison, "base", "tokens_per_second")
    assert speed.void == "the machine was not idle"
    assert not speed.stands
    assert speed.value is not None
    assert headline(comparison, "base", "kv_bytes_per_token").void is None
    assert comparison.front is not None
    assert comparison.front.excluded == {"base": "tokens/s: the machine was not idle"}
    assert "Void because the machine was not idle: base." in comparison.notes


def test_an_unknown_closed_gate_voids_all_of_a_benchmark(lab: Any) -> None:
    base = lab.train("base", 0)
    lab.benchmark(base, 100, gates={"engine": False})
    comparison = built(lab)
    for metric in ("tokens_per_second", "kv_bytes_per_token", "peak_memory_bytes"):
        assert headline(comparison, "base", metric).void == "gate 'engine' is closed"


def test_a_budget_gives_each_arm_its_own_batch(lab: Any) -> None:
    for job, kv, largest in (("base", 4096.0, 8), ("block", 1024.0, 32)):
        model = lab.train(job, 0)
        lab.benchmark(model, 100, kv=kv, batches=(1, 8, 32), largest=largest)
        name = f"speed[of={model}]"
        spec = next(row.spec for row in lab.jobs if row.name == name)
        spec["batch"] = [1, 8]
    comparison = built(lab, baseline="base", pareto=["decode_tokens_per_second_at_budget"])
    assert comparison.column("tokens_per_second[speed,batch=32]") is None
    assert headline(comparison, "base", "largest_batch").value == 8
    base = headline(comparison, "base", "tokens_per_second_at_budget")
    block = headline(comparison, "block", "tokens_per_second_at_budget")
    assert base.value == pytest.approx(100 * 8**0.8)
    assert block.value == pytest.approx(100 * 32**0.8)
    assert block.change is not None
    assert block.change.verdict == "better"
    assert comparison.front is not None
    assert comparison.front.members == ("block",)


def test_a_front_that_lacks_a_metric_is_said(lab: Any) -> None:
    lab.evaluate(lab.train("base", 0), 3.5)
    comparison = built(lab)
    assert comparison.front is None
    text = "No Pareto front: nothing here measured tokens/s or KV per token."
    assert text in comparison.notes


def test_one_void_seed_is_left_out(lab: Any) -> None:
    for seed in (0, 1, 2):
        base = lab.train("base", seed)
        lab.benchmark(base, 100 + seed, gates={"alone": seed != 1}, batches=(1,))
    comparison = built(lab)
    number = headline(comparison, "base", "tokens_per_second")
    assert number.void is None
    assert dict(number.seeds) == {"0": 100.0, "2": 102.0}
    assert number.expected == 3
    assert number.missing == "1 seed left out (the machine was not idle)"
    assert "base: 1 seed left out (the machine was not idle)." in comparison.notes


def test_what_failed_is_shown_with_its_cause(lab: Any) -> None:
    for seed in (0, 1):
        base = lab.train("base", seed)
        lab.evaluate(base, 3.5)
    dead = lab.train("dead", 0, outcome=(Cause.DIVERGED, "loss is NaN at step 40\nmore"))
    lab.evaluate(dead, 0, outcome=JobState.SKIPPED)
    half = [
        lab.train("half", 0),
        lab.train("half", 1, outcome=(Cause.OUT_OF_MEMORY, "no room")),
    ]
    lab.evaluate(half[0], 3.6)
    lab.evaluate(half[1], 0, outcome=JobState.SKIPPED)
    slow = lab.train("slow", 0, outcome=JobState.RUNNING)
    lab.evaluate(slow, 0, outcome=JobState.WAITING)
    comparison = built(lab)
    assert [arm.id for arm in comparison.arms] == ["base", "dead", "half", "slow"]
    assert headline(comparison, "dead", "perplexity").missing == "skipped"
    assert comparison.arm("dead").problems == (
        "dead[seed=0] failed (diverged): loss is NaN at step 40",
        "quality[of=dead[seed=0]] was skipped because dead[seed=0] failed",
    )
    number = headline(comparison, "half", "perplexity")
    assert (len(number.seeds), number.expected) == (1, 2)
    assert headline(comparison, "slow", "perplexity").missing == "waiting"
    assert comparison.front is None or "dead" not in comparison.front.members


def test_a_model_that_nobody_measured_is_still_an_arm(lab: Any) -> None:
    base = lab.train("base", 0)
    lab.evaluate(base, 3.5)
    lab.train("alone", 0)
    parent = lab.train("parent", 0)
    lab.evaluate(lab.train("child", 0, start=parent), 3.4)
    comparison = built(lab)
    assert [arm.id for arm in comparison.arms] == ["base", "alone", "child"]
    assert headline(comparison, "alone", "perplexity").missing == "not measured"


def test_a_baseline_matrix_pairs_on_the_axes_both_have(lab: Any) -> None:
    for rate in (1, 2):
        base = lab.train("base", 0, axes={"rate": rate})
        lab.evaluate(base, 3.5)
        lab.evaluate(lab.train("up", 0, axes={"rate": rate, "rank": 4}, start=base), 3.4)
    lab.evaluate(lab.train("other", 0), 3.3)
    comparison = built(lab)
    assert comparison.arm("up[rate=2, rank=4]").against == "base[rate=2]"
    assert comparison.arm("other").against is None


def test_axes_that_read_alike_stay_apart(lab: Any) -> None:
    for value in (1, "1"):
        name = lab.train("base", 0, axes={"x": value})
        lab.rename(name, f"{name} {value!r}")
        lab.evaluate(f"{name} {value!r}", 3.5)
    assert [arm.id for arm in built(lab).arms] == ["base[x=1]", "base[x=1] #2"]


def test_without_a_baseline_nothing_is_a_ratio(quickstart: Any) -> None:
    comparison = built(quickstart, pareto=["perplexity", "tokens_per_second"])
    assert all(arm.against is None for arm in comparison.arms)
    assert all(n.change is None for arm in comparison.arms for n in arm.numbers.values())
    assert comparison.front is not None
    assert len(comparison.front.columns) == 2


def test_a_baseline_that_measures_nothing_is_said(lab: Any) -> None:
    lab.evaluate(lab.train("other", 0), 3.5)
    comparison = built(lab, baseline="base")
    assert "The baseline 'base' has no measured model" in comparison.notes[0]


def test_a_dominated_arm_is_off_the_front(lab: Any) -> None:
    for seed in (0, 1, 2):
        for job, loss, speed in (("base", 3.5, 100), ("good", 3.4, 200), ("tied", 3.4, 200.5)):
            model = lab.train(job, seed)
            lab.evaluate(model, loss + 0.001 * seed, noise=0.01)
            lab.benchmark(model, speed * (1 + 0.02 * (seed - 1)))
    front = built(lab).front
    assert front is not None
    assert set(front.members) == {"good", "tied"}
    assert "good" in front.dominated["base"]


def test_means_over_other_seeds_strike_nobody_off(lab: Any) -> None:
    """The baseline's third seed went badly; `fast` lacks it, and loses on the two they share."""
    for seed, loss in enumerate((3.50, 3.51, 4.2)):
        base = lab.train("base", seed)
        lab.evaluate(base, loss, noise=0.001)
        lab.benchmark(base, 100 + seed)
        fast = lab.train("fast", seed)
        died = (Cause.DIVERGED, "nan") if seed == 2 else None
        lab.evaluate(fast, 3.60 + 0.01 * seed, noise=0.001, outcome=died)
        lab.benchmark(fast, 200 + seed)
    comparison = built(lab)
    lost = headline(comparison, "fast", "perplexity")
    assert lost.value is not None
    assert lost.value < (headline(comparison, "base", "perplexity").value or 0)
    assert lost.change is not None
    assert lost.change.verdict == "worse"
    assert comparison.front is not None
    assert comparison.front.members == ("base", "fast")
    assert lost.unpaired == "means over seeds 0, 1, the baseline's over 0, 1, 2"
    assert headline(comparison, "fast", "tokens_per_second").unpaired is None
    (note,) = [note for note in comparison.notes if note.startswith("fast: means over")]
    assert "rest on the seeds that both have" in note
    cells = [cell for sheet in (main_sheet(comparison),) for row in sheet.rows for cell in row]
    marked = [cell for cell in cells if "other seeds" in " ".join(one.text for one in cell.lines)]
    assert {(lost.unpaired or "") in cell.hint for cell in marked} == {True}


def test_a_workflow_without_models_compares_nothing(lab: Any) -> None:
    lab.add("sleep", "sleep", "noop", {"sleep": 0}, {}, {}, {"slept": 0})
    comparison = built(lab)
    assert comparison.arms == ()
    assert comparison.columns == ()


def test_results_with_holes_are_read(lab: Any) -> None:
    base = lab.train("base", 0)
    lab.evaluate(base, 3.5)
    result = lab.outcomes[f"quality[of={base}]"]
    result |= {"perplexity": None, "window_losses": [1.0], "window_targets": [], "loss": 3.5}
    lab.add(
        "speed", "speed", "benchmark", {"prompt": 8}, {"seed": 0}, {"of": base},
        {"rows": [{"batch": 1, "tokens_per_second": {"median": float("nan")}}]},
    )  # fmt: skip
    comparison = built(lab)
    assert headline(comparison, "base", "perplexity_per_byte").value is not None
    assert comparison.headline("perplexity") is None
    assert comparison.headline("tokens_per_second") is None


def test_json_is_plain_and_complete(quickstart: Any) -> None:
    raw = built(quickstart).to_json()
    text = json.dumps(raw, allow_nan=False)
    assert json.loads(text) == raw
    assert raw["schema"] == 1
    number = raw["arms"][1]["numbers"]["tokens_per_second[speed,batch=32]"]
    assert number["change"]["verdict"] == "better"
    assert number["seeds"].keys() == {"0", "1", "2"}
    assert {c["id"] for c in raw["columns"]} >= {"perplexity[quality]", "train_seconds"}


def test_arms_whose_steps_were_not_replayed_alike_are_named(lab: Any) -> None:
    base, other, third = (lab.train(name, 0) for name in ("base", "other", "third"))
    lab.benchmark(base, 100, replayed=0.992)
    lab.benchmark(other, 100, replayed=0.984)
    assert not [note for note in built(lab).notes if "replayed" in note]
    lab.benchmark(third, 100, replayed=0.0)
    (note,) = [note for note in built(lab).notes if "replayed" in note]
    assert "99 % of base; 98 % of other; 0 % of third." in note


def test_eager_steps_that_were_asked_for_stand_in_columns_of_their_own(lab: Any) -> None:
    base = lab.train("base", 0)
    lab.benchmark(base, 100, replayed=0.99)
    lab.benchmark(base, 80, job="slow", replayed=0.0, cuda_graph=False)
    comparison = built(lab)
    titles = {setting.id: setting.title for setting in comparison.settings}
    assert "eager steps" in titles["slow"]
    assert "eager steps" not in titles["speed"]
    numbers = comparison.arm("base").numbers
    assert numbers["tokens_per_second[speed,batch=1]"].value == 100
    assert numbers["tokens_per_second[slow,batch=1]"].value == 80
