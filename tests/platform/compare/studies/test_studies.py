"""What is read of a study: its trials, who wins, what is said of it, and what is no arm."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvlab.db.states import Cause, JobState
from kvlab.methods.registry import REGISTRY
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.statistics import t_quantile
from kvlab.platform.compare.studies import REFERENCE
from kvlab.platform.compare.study_words import setting_text, short_names

ONE = {"perplexity": "minimize"}
THREE = {
    "perplexity": "minimize",
    "tokens_per_second": "maximize",
    "kv_bytes_per_token": "minimize",
}


def losses(trial: Any) -> tuple[float, ...]:
    """Three numbers of which less is better."""
    return (
        trial.value("perplexity"),
        -trial.value("tokens_per_second"),
        trial.value("kv_bytes_per_token"),
    )


def test_trials_are_no_arms_and_arms_stay_what_they_were(search: Any, lab: Any) -> None:
    for seed in (0, 1):
        lab.evaluate(f"base[seed={seed}]", 3.5, noise=0.01)
        lab.evaluate(f"base[seed={seed}]", 3.6, noise=0.01, apply={"eviction": {"h2o": {}}})
    before = compare(lab.load(lab.save()))
    assert [arm.id for arm in before.arms] == ["base", "base + h2o"]
    study = search(ONE)
    for number in range(4):
        study.trial(0.1 + 0.1 * number, 0.2, 3.6)
    study.done()
    after = compare(lab.load(lab.save()))
    assert [replace(arm, models=()) for arm in after.arms] == [
        replace(arm, models=()) for arm in before.arms
    ]
    assert (after.columns, after.settings) == (before.columns, before.settings)
    said = "16 jobs of the trials of best are left to its own sheet, and are no arms."
    assert set(after.notes) - set(before.notes) == {said}


def test_what_a_trial_trained_is_no_arm_unless_another_job_measures_it(
    search: Any, lab: Any
) -> None:
    study = search(ONE, seeds=(0,))
    study.trial(0.1, 0.2, 3.6)
    for kind in ("uptrain", "train"):
        lab.train(f"best/0/{kind}", 0, start="base[seed=0]")
    study.done()
    unused = "base"  # its second seed, which no job uses
    assert [arm.id for arm in study.compared().arms] == [unused]
    lab.evaluate("best/0/train[seed=0]", 3.4)
    assert [arm.id for arm in study.compared().arms] == [unused, "best/0/train"]


def test_methods_of_trials_do_not_lengthen_the_names_of_arms(search: Any, lab: Any) -> None:
    default = REGISTRY.find("block_transformer").params().block_length  # type: ignore[union-attr]

    def method(length: int) -> dict[str, Any]:
        return {"granularity": {"block_transformer": {"block_length": length}}}

    lab.evaluate(lab.train("block", 0, method=method(default)), 3.5)
    study = search(ONE)
    study.trial(0.1, 0.2, 3.6)
    lab.train("best/0/train", 0, method=method(2 * default))
    study.done()
    (arm,) = study.compared().arms
    assert (arm.id, arm.method) == ("block", "block_transformer")


def test_one_objective_has_a_winner_set_against_the_baseline(search: Any) -> None:
    study = search(ONE, [("kv_bytes_per_token", "<=", 3500, False)], baseline=True)
    for loss, kv in ((3.52, 3000.0), (3.4, 4000.0), (3.45, 3200.0), (3.6, 1000.0)):
        study.trial(0.3, 0.2 + loss / 100, loss, kv=kv)
    result = study.done()
    (found,) = study.compared().studies
    assert (found.best, found.against) == (2, "base")
    assert [trial.feasible for trial in found.trials] == [True, False, True, True]
    assert found.trials[1].missed == ["kv_bytes_per_token <= 3500"]
    assert found.trials[1].beyond["kv_bytes_per_token <= 3500"] == 500
    ours = result["trials"][2]["measured"]["perplexity"]["seeds"]
    theirs = result["baseline"]["perplexity"]["seeds"]
    apart = [math.log(ours[seed] / theirs[seed]) for seed in ("0", "1")]
    half = t_quantile(0.975, 1) * abs(apart[0] - apart[1]) / 2
    change = found.trials[2].numbers["perplexity"].change
    assert change is not None
    assert change.ratio == pytest.approx(math.exp(sum(apart) / 2))
    assert change.low == pytest.approx(math.exp(sum(apart) / 2 - half))
    assert change.high == pytest.approx(math.exp(sum(apart) / 2 + half))
    counted = found.trials[2].numbers["kv_bytes_per_token"].change
    assert counted is not None
    assert counted.ratio == counted.low == pytest.approx(3200 / 4096)


def test_the_best_so_far_is_of_trials_that_meet_the_constraints(search: Any) -> None:
    study = search(ONE, [("kv_bytes_per_token", "<=", 3500, False)])
    for loss, kv in ((3.3, 4000.0), (3.5, 3000.0), (3.6, 3000.0), (3.2, 4000.0), (3.4, 3000.0)):
        study.trial(0.3, 0.2 + loss / 100, loss, kv=kv)
    study.done()
    (found,) = study.compared().studies
    value = {trial.number: trial.value("perplexity") for trial in found.trials}
    assert found.progress.trials == (0, 1, 2, 3, 4)
    assert found.progress.best == {"perplexity": (None, value[1], value[1], value[1], value[4])}
    assert found.progress.hypervolume == ()


def test_the_front_of_three_objectives(mixed: Any) -> None:
    (found,) = mixed.compared().studies
    able = [trial for trial in found.run if trial.feasible]
    undominated = {
        one.number
        for one in able
        if not any(
            all(a <= b for a, b in zip(losses(two), losses(one), strict=True))
            and losses(two) != losses(one)
            for two in able
        )
    }
    assert set(found.front) == undominated == {0, 2, 4}
    assert found.best is None
    assert found.states == {"complete": 5, "failed": 1}
    assert [trial.number for trial in able] == [0, 2, 4, 6]
    assert found.trial(4).void == "the machine was not idle"
    assert found.trial(4).numbers["tokens_per_second"].change is None
    assert found.trial(4).numbers["perplexity"].change is not None
    assert (found.trial(5).same_as, found.trial(3).message) == (
        0,
        "best/3/evaluate[seed=1]: no memory",
    )


def test_hypervolume_is_the_share_of_a_box_and_never_falls(mixed: Any) -> None:
    (found,) = mixed.compared().studies
    table = np.array([losses(trial) for trial in found.feasible])
    scaled = (table - table.min(0)) / (table.max(0) - table.min(0))
    points = np.random.default_rng(0).uniform(0, REFERENCE, (40_000, 3))
    curve = found.progress.hypervolume
    # 0, 2, 4 and 6 are feasible; 1 and 3 add nothing, and 5 was never run.
    reached = [
        float((points[:, None] >= scaled[None, :n]).all(2).any(1).mean()) for n in (1, 2, 3, 4)
    ]
    assert found.progress.trials == (0, 1, 2, 3, 4, 6)
    assert curve == pytest.approx([reached[n] for n in (0, 0, 1, 1, 2, 3)], abs=0.01)
    assert list(curve) == sorted(curve)
    assert 0 < curve[0] < curve[-1] < 1


def test_the_best_so_far_of_each_objective_goes_its_own_way(search: Any) -> None:
    study = search(THREE)
    for loss, speed, kv in ((3.5, 120, 3000.0), (3.6, 150, 2000.0), (3.4, 110, 2500.0)):
        study.trial(0.1, loss / 10, loss, speed, kv)
    study.done()
    (found,) = study.compared().studies
    values = [[trial.value(name) for trial in found.trials] for name in THREE]
    (p0, _, p2), (s0, s1, _), (k0, k1, _) = values
    assert found.progress.best == {
        "perplexity": (p0, p0, p2),
        "tokens_per_second": (s0, s1, s1),
        "kv_bytes_per_token": (k0, k1, k1),
    }


@pytest.mark.parametrize("objectives", [ONE, {**THREE, "peak_memory_bytes": "minimize"}])
def test_there_is_no_hypervolume_of_one_objective_or_four(search: Any, objectives: Any) -> None:
    study = search(objectives)
    study.trial(0.1, 0.2, 3.5)
    study.trial(0.2, 0.2, 3.4)
    study.done()
    assert study.compared().studies[0].progress.hypervolume == ()


def test_one_point_is_no_box(search: Any) -> None:
    study = search(THREE)
    study.trial(0.1, 0.2, 3.5)
    study.done()
    assert study.compared().studies[0].progress.hypervolume == ()


def test_a_study_without_a_complete_trial(search: Any) -> None:
    study = search(THREE, asked=2)
    study.trial(0.1, 0.2, 3.5, fails="no memory")
    study.trial(0.2, 0.2, 3.5, fails="too slow")
    study.done()
    text = study.printed()
    assert "2 trials (2 failed)" in text
    assert "2 trials failed: first trial 0 (best/0/evaluate[seed=1]: no memory)." in text
    assert "best: no trial was completed." in text
    assert "<script" not in study.page()


def test_numbers_that_are_not_finite_are_null_and_a_reason(search: Any) -> None:
    study = search(ONE, baseline=True)
    study.trial(0.1, 0.2, 3.5)
    study.trial(0.2, 0.2, 3.5)
    study.rows[1] |= {"state": "failed", "objectives": {}, "constraints": {}}
    wrong = {"value": math.inf, "low": math.nan, "high": math.inf, "seeds": {"0": math.inf}}
    study.rows[1]["measured"] = {"perplexity": {**wrong, "void": None}}
    study.done()
    assert "trial 1 (its perplexity is no finite number)" in study.printed()
    raw = json.loads(json.dumps(study.compared().to_json(), allow_nan=False))
    number = raw["studies"][0]["trials"][1]["numbers"]["perplexity"]
    assert (number["value"], number["low"], number["change"]) == (None, None, None)
    assert "study-0-history" in study.page()


def test_a_baseline_that_is_not_finite_is_compared_with_nothing(search: Any) -> None:
    study = search(ONE, baseline=True)
    study.trial(0.1, 0.2, 3.5)
    study.base["perplexity"] = replace(study.base["perplexity"], value=math.inf)
    study.done()
    assert study.compared().studies[0].trials[0].numbers["perplexity"].change is None
    assert "study-0-history" in study.page()


def test_the_json_has_all_of_it(mixed: Any) -> None:
    raw = json.loads(json.dumps(mixed.compared().to_json(), allow_nan=False))
    (found,) = raw["studies"]
    assert (found["id"], found["sampler"], found["asked"], found["seeds"]) == ("best", "tpe", 10, 2)
    assert found["objectives"] == THREE
    assert found["constraints"] == ["perplexity <= 1.1 * baseline"]
    assert (found["front"], found["importances"]) == ([0, 2, 4], None)
    assert found["ended"].startswith("all 6 feasible points")
    assert len(found["trials"]) == 7
    stored = mixed.rows[2]["measured"]["perplexity"]
    number = found["trials"][2]["numbers"]["perplexity"]
    assert {key: number[key] for key in ("value", "low", "high", "seeds")} == {
        key: stored[key] for key in ("value", "low", "high", "seeds")
    }
    assert raw["unfound"] == []


@pytest.mark.parametrize(
    ("outcome", "notes"),
    [
        (
            (Cause.USER_ERROR, "no trial was completed: no memory\nin detail"),
            [
                "best failed (user_error): no trial was completed: no memory.",
                "4 jobs of the trials of best are no arms, and best has no sheet.",
            ],
        ),
        (
            JobState.RUNNING,
            ["4 jobs of the trials of best are no arms; best has a sheet when it is done."],
        ),
    ],
)
def test_a_study_that_found_nothing_is_in_the_notes(
    search: Any, outcome: Any, notes: list[str]
) -> None:
    study = search(ONE)
    study.trial(0.1, 0.2, 3.5)
    study.lab.outcomes["best"] = outcome
    found = study.compared()
    assert (found.studies, found.unfound) == ((), ("best",))
    assert [note for note in found.notes if "best" in note] == notes
    assert "No result of best: see the notes." in study.printed()


def test_trials_of_one_study_are_not_those_of_another(search: Any) -> None:
    for name, count in (("best", 1), ("best.2", 2)):
        study = search(ONE, name=name)
        for number in range(count):
            study.trial(0.1 + 0.1 * number, 0.2, 3.5)
        study.done()
    found = study.compared()
    assert [(one.id, len(one.trials)) for one in found.studies] == [("best", 1), ("best.2", 2)]
    assert "4 jobs of the trials of best are left" in " ".join(found.notes)
    assert "8 jobs of the trials of best.2 are left" in " ".join(found.notes)


def test_names_are_short_where_they_stay_apart() -> None:
    assert short_names(["a.p", "b.p", "b.share", "seed"]) == {
        "a.p": "a.p",
        "b.p": "b.p",
        "b.share": "share",
        "seed": "seed",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.45006976901015405, "0.4501"),
        (1234567, "1234567"),
        (1e-5, "1e-05"),
        (True, "true"),
        (None, "null"),
        ("h2o", "h2o"),
        ({"h2o": {"recent": 0.5}}, '{"h2o": {"recent": 0.5}}'),
    ],
)
def test_values_as_a_person_reads_them(value: Any, text: str) -> None:
    assert setting_text(value) == text
