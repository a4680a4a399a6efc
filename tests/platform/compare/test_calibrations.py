"""Calibrate jobs in a comparison: the table, the JSON, the report, and the arms they decide."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store
from kvlab.platform.compare import report_of
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.calibrations import Calibration
from kvlab.platform.compare.table import draw
from kvlab.platform.jobs.calibrate.stability import shares_of, stability, summary

H2O = {"eviction": {"h2o": {"recent": 0.5, "positions": "absolute", "generated": "evict"}}}


def found(*, noise: float = 0.02, p: float | None = 0.35) -> dict[str, Any]:
    """A result as the job makes it: six KV layers of an eight-layer model."""
    torch.manual_seed(0)
    centre = torch.tensor([0.2, 0.6, 0.62, 0.9, 0.92, 0.95], dtype=torch.float64)
    values = centre + noise * torch.randn(16, 6, dtype=torch.float64)
    stable = stability(values, p, torch.arange(16) // 8)
    of_layers = {"layers": summary(values), "kv_layers": summary(values)}
    return {
        "samples": 16,
        "sequence_length": 64,
        "layers": 8,
        "kv_layers": [0, 1, 2, 4, 5, 7],
        "importances": {"cosine": of_layers, "mass": of_layers},
        "stability": {"cosine": stable, "mass": stable},
        "lengths": [{"tokens": 8, "agreement": 0.5}, {"tokens": 64, "agreement": 1.0}],
        "budgets": {
            "importance": "cosine",
            "p": p,
            "groups": stable["groups"],
            "shares": shares_of(values.mean(0).tolist(), p).tolist(),
        },
    }


def calibrate(lab: Any, of: str, outcome: Any, *, p: float | None = None) -> str:
    axes = {"calibrate.p": p} if p is not None else {}
    inside = "".join(f"p={p}," for _ in axes)
    inside += f"of={of}," if of != "base[seed=0]" else ""
    name, parents = f"groups[{inside}seed=0]", {"of": of, "data": "data"}
    model = next(row for row in lab.jobs if row.name == of)
    shown = {key.split(".")[-1]: value for key, value in axes.items()}
    return str(
        lab.add(name, "groups", "calibrate", {"p": p}, {**model.axes, **shown}, parents, outcome)
    )


def given(lab: Any, measured: str, source: str) -> None:
    """Let the newest measurement take its budgets from a calibrate job."""
    job = lab.jobs[-1]
    assert job.name == measured
    job.parents["budgets"] = source


@pytest.fixture
def study(lab: Any) -> Any:
    base = lab.train("base", 0)
    source = calibrate(lab, base, found())
    lab.evaluate(base, 3.5, noise=0.01)
    lab.evaluate(base, 3.7, apply=H2O, noise=0.01)
    fixed = lab.evaluate(base, 3.6, job="fixed", apply=H2O, noise=0.01)
    given(lab, fixed, source)
    return lab


def printed(lab: Any, width: int = 200) -> str:
    out = io.StringIO()
    draw(compare(lab.load(lab.save())), Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_arms_under_fixed_budgets_say_so(study: Any) -> None:
    comparison = compare(study.load(study.save()))
    names = [arm.id for arm in comparison.arms]
    assert names == ["base", "base + h2o", "base + h2o with budgets of groups"]
    assert [arm.baseline for arm in comparison.arms] == [True, False, False]
    column = comparison.headline("perplexity")
    assert column is not None
    plain, fixed = (comparison.arm(name).number(column.id).value for name in names[1:])
    assert plain is not None
    assert fixed is not None
    assert plain > fixed


def test_budgets_of_several_points_are_told_apart(lab: Any) -> None:
    base = lab.train("base", 0)
    sources = [calibrate(lab, base, found(p=p), p=p) for p in (0.2, 0.4)]
    for number, source in enumerate(sources):
        measured = lab.evaluate(base, 3.6, job=f"fixed{number}", apply=H2O)
        given(lab, measured, source)
    comparison = compare(lab.load(lab.save()))
    assert [arm.id for arm in comparison.arms] == [
        "base + h2o with budgets of groups[p=0.2]",
        "base + h2o with budgets of groups[p=0.4]",
    ]


def test_budgets_found_of_other_models_are_told_apart(lab: Any) -> None:
    models = [lab.train(name, 0) for name in ("small", "large", "base")]
    for number, model in enumerate(models[:2]):
        source = calibrate(lab, model, found())
        measured = lab.evaluate(models[2], 3.6, job=f"by{number}", apply=H2O)
        given(lab, measured, source)
    comparison = compare(lab.load(lab.save()))
    assert [arm.id for arm in comparison.arms if arm.job == "base"] == [
        "base + h2o with budgets of groups[of=large]",
        "base + h2o with budgets of groups[of=small]",
    ]


def test_the_table_and_the_sentence(study: Any) -> None:
    text = printed(study)
    assert "Calibration" in text
    row = next(line for line in text.splitlines() if line.lstrip().startswith("groups[seed=0]"))
    assert re.search(r"cosine\s+4-5, 7\s+100\.0 %\s+100\.0 %\s+0\.\d{3}\s+0\.0 %", row)
    assert "budgets, p 0.35" in text
    assert "not used" in text
    assert "at 8 tokens" in text
    assert (
        "groups[seed=0]: base[seed=0] is cut in layers 4-5, 7; 100 % of 16 samples cut exactly"
        in text
    )


def test_unstable_groups_read_so(lab: Any) -> None:
    base = lab.train("base", 0)
    calibrate(lab, base, found(noise=0.3))
    comparison = compare(lab.load(lab.save()))
    assert comparison.arms == ()
    measure = comparison.calibrations[0].main
    assert measure.as_mean < 0.9
    assert measure.moved > 0.05
    text = printed(lab)
    assert f"{measure.as_mean:.1%}".replace("%", " %") in text
    assert "measures no model" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(study: Any, width: int) -> None:
    assert max(len(line.rstrip()) for line in printed(study, width).splitlines()) <= width


def test_the_json_has_all_of_it(study: Any) -> None:
    raw = json.loads(json.dumps(compare(study.load(study.save())).to_json(), allow_nan=False))
    [calibration] = raw["calibrations"]
    assert calibration["id"] == "groups[seed=0]"
    assert calibration["model"] == "base[seed=0]"
    assert calibration["kv_layers"] == [0, 1, 2, 4, 5, 7]
    assert sum(calibration["shares"]) == pytest.approx(6)
    assert [measure["name"] for measure in calibration["measures"]] == ["cosine", "mass"]
    assert calibration["lengths"] == {"8": 0.5, "64": 1.0}


def test_the_report_draws_importances_bands_and_cuts(study: Any) -> None:
    wid = study.save()
    with Store.open(f"sqlite:///{study.home / 'kvlab.db'}", read_only=True) as store:
        page = report_of(store, wid)
    assert page is not None
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page)[0])
    own = {name: figure for name, figure in figures.items() if name.startswith("calibration")}
    assert list(own) == ["calibration-0", "calibration-1"]
    data = own["calibration-0"]["data"]
    marks = [trace for trace in data if trace.get("mode") == "markers"]
    result = study.outcomes["groups[seed=0]"]
    mean = result["importances"]["cosine"]["kv_layers"]["mean"]
    drawn = {x: y for t in marks for x, y in zip(t["x"], t["y"], strict=True)}
    assert drawn == dict(zip(["0", "1", "2", "4", "5", "7"], mean, strict=True))
    cut = next(trace for trace in marks if trace["name"].startswith("third"))
    assert cut["x"] == ["4", "5", "7"]
    bars = [trace for trace in data if trace["type"] == "bar"]
    assert sum(len(trace["x"]) for trace in bars) == 6
    assert all(y == 1 for trace in bars if trace["name"].startswith("third") for y in trace["y"])
    bands = [trace for trace in data if trace.get("fill") == "tonexty"]
    quantiles = result["importances"]["cosine"]["kv_layers"]["quantiles"]
    assert [trace["y"] for trace in bands] == [quantiles["0.95"], quantiles["0.75"]]
    assert "Calibration" in page


def test_a_report_of_a_calibration_alone(lab: Any) -> None:
    base = lab.train("base", 0)
    calibrate(lab, base, found())
    wid = lab.save()
    with Store.open(f"sqlite:///{lab.home / 'kvlab.db'}", read_only=True) as store:
        page = report_of(store, wid)
    assert page is not None
    assert '"calibration-0"' in page


def test_one_that_failed_is_not_shown_and_stops_what_rests_on_it(lab: Any) -> None:
    base = lab.train("base", 0)
    source = calibrate(lab, base, (Cause.USER_ERROR, "too little text"))
    measured = lab.evaluate(base, 0, apply=H2O, outcome=JobState.SKIPPED)
    given(lab, measured, source)
    comparison = compare(lab.load(lab.save()))
    assert comparison.calibrations == ()
    assert any("was skipped because groups[seed=0] failed" in note for note in comparison.notes)


def test_layers_that_are_alike() -> None:
    measure: Any = dict.fromkeys(
        ("as_mean", "as_majority", "agreement", "rank_correlation"), 1.0
    ) | dict.fromkeys(("moved", "moved_most", "section_agreement", "sections_moved"), 0.0)
    from kvlab.platform.compare.calibrations import Measure, calibrations_in_words

    one = Measure("cosine", (0.5,) * 3, {}, (0, 0, 0), (0.0,) * 3, **measure)
    alike = Calibration("c", "m", 4, 8, (0, 1, 2), "cosine", 0.35, (1.0,) * 3, (one,), {})
    assert calibrations_in_words([alike]) == ["c: all layers of m are alike, so none is cut."]
