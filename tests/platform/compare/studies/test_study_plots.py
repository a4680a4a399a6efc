"""What the report draws of a study."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest

TWO = {"perplexity": "minimize", "tokens_per_second": "maximize"}
ATTACK = '</script><img src=x onerror="alert(1)">'


def figures(study: Any) -> dict[str, Any]:
    """The report's figures, each of which Plotly takes."""
    found = json.loads(re.findall(r'id="figures">(.*?)</script>', study.page())[0])
    for figure in found.values():
        go.Figure(figure)  # raises on a property that does not exist
    return {name: figure for name, figure in found.items() if name.startswith("study")}


def traces(figure: Any, **wanted: Any) -> list[Any]:
    return [
        trace
        for trace in figure["data"]
        if all(trace.get(key) == value for key, value in wanted.items())
    ]


@pytest.fixture
def two(search: Any) -> Any:
    """24 trials of two objectives that p trades, a fifth of which miss the constraint."""
    study = search(TWO, [("perplexity", "<=", 60, False)], baseline=True, asked=24)
    for number in range(24):
        dtype = ("float32", "bfloat16")[number % 2]
        loss, speed = 3.5 + 0.03 * number + 0.05 * (number % 3), 100 + 5 * number
        study.trial(0.1 + 0.03 * number, 0.2 + 0.01 * (number % 5), loss, speed, dtype=dtype)
    study.done()
    return study


def test_every_plot_is_drawn(two: Any) -> None:
    assert list(figures(two)) == [
        "study-0-front",
        "study-0-history",
        "study-0-importances",
        "study-0-slices",
    ]


def test_the_front_its_groups_and_the_baseline(two: Any) -> None:
    figure = figures(two)["study-0-front"]
    (found,) = two.compared().studies
    groups = {trace["name"]: trace for trace in traces(figure, mode="markers")}
    wanted = {
        "misses a constraint": [t for t in found.run if not t.feasible],
        "feasible": [t for t in found.feasible if t.number not in found.front],
        "on the front": [t for t in found.feasible if t.number in found.front],
    }
    assert set(groups) == {*wanted, "base, baseline"}
    for name, trials in wanted.items():
        assert trials
        assert groups[name]["y"] == [trial.value("perplexity") for trial in trials]
        assert groups[name]["x"] == [trial.value("tokens_per_second") for trial in trials]
        assert [text.split("<br>")[0] for text in groups[name]["text"]] == [
            f"trial {trial.number}" for trial in trials
        ]
    base = found.baseline
    assert groups["base, baseline"]["x"] == [base["tokens_per_second"].value]
    assert groups["base, baseline"]["y"] == [base["perplexity"].value]
    (line,) = traces(figure, mode="lines")
    assert line["x"] == sorted(groups["on the front"]["x"])
    # Speed is wanted: a point's perplexity is within reach at every lower speed.
    assert line["line"]["shape"] == "vh"
    assert "perplexity" in figure["layout"]["yaxis"]["title"]["text"]


def test_pointing_at_a_mark_tells_the_trial(two: Any) -> None:
    figure = figures(two)["study-0-front"]
    missing = traces(figure, name="misses a constraint")[0]["text"][-1].split("<br>")
    assert missing[:4] == ["trial 23", "p=0.79", "share=0.23", "dtype=bfloat16"]
    assert re.fullmatch(r"perplexity [\d.]+ \(95 % interval [\d.]+ to [\d.]+\)", missing[4])
    assert missing[-1] == "misses perplexity &lt;= 60"


def test_a_third_objective_is_not_drawn_and_that_is_said(mixed: Any) -> None:
    drawn = figures(mixed)
    assert traces(drawn["study-0-front"], mode="lines") == []
    assert "Other objectives are not drawn." in mixed.page()
    assert "study-0-importances" not in drawn


def test_the_history_of_every_objective_and_of_the_hypervolume(mixed: Any) -> None:
    figure = figures(mixed)["study-0-history"]
    (found,) = mixed.compared().studies
    for axis, name in zip(("y", "y2", "y3"), found.objectives, strict=True):
        (best,) = traces(figure, yaxis=axis, name="best so far")
        assert best["x"] == [0, 1, 2, 3, 4, 6]
        assert best["y"] == list(found.progress.best[name])
        marks = {
            x: y
            for trace in traces(figure, yaxis=axis, mode="markers")
            for x, y in zip(trace["x"], trace["y"], strict=True)
        }
        assert marks == {n: found.trial(n).value(name) for n in (0, 1, 2, 4, 6)}
        (base,) = traces(figure, yaxis=axis, name="base, baseline")
        assert base["y"] == [found.baseline[name].value] * 2
    (volume,) = traces(figure, yaxis="y4")
    assert volume["y"] == list(found.progress.hypervolume)
    spans = [figure["layout"][axis]["domain"] for axis in ("yaxis", "yaxis2", "yaxis3", "yaxis4")]
    assert all(upper[0] > lower[1] for upper, lower in pairwise(spans))
    assert figure["layout"]["yaxis4"]["title"]["text"] == "hypervolume"


def test_shares_of_one_axis_are_not_those_of_the_next(search: Any) -> None:
    objectives = {"top1_agreement": "maximize", "perplexity": "minimize"}
    study = search({"tokens_per_second": "maximize", "perplexity": "minimize"})
    study.trial(0.1, 0.2, 3.5)
    text = json.dumps(study.done()).replace("tokens_per_second", "top1_agreement")
    study.lab.outcomes["best"] = json.loads(text)
    study.objectives.clear()
    study.objectives.update(objectives)
    layout = figures(study)["study-0-history"]["layout"]
    assert layout["yaxis"]["tickformat"] == ".0%"
    assert "tickformat" not in layout["yaxis2"]


def test_importances_are_bars(two: Any) -> None:
    data = figures(two)["study-0-importances"]["data"]
    (found,) = two.compared().studies
    assert found.importances is not None
    assert [trace["name"] for trace in data] == ["perplexity", "tokens/s"]
    for trace, shares in zip(data, found.importances.values(), strict=True):
        assert trace["x"] == list(shares.values())
        assert trace["x"] == sorted(trace["x"], reverse=True)
        assert trace["y"] == [path.split(".")[1] for path in shares]


def test_slices_are_each_objective_by_each_parameter(two: Any) -> None:
    figure = figures(two)["study-0-slices"]
    (found,) = two.compared().studies
    layout = figure["layout"]
    assert found.importances is not None
    paths = sorted(found.space, key=lambda path: -found.importances["perplexity"].get(path, 0))
    assert paths[0] == "squeeze_attention.p"
    kinds = {"p": "linear", "share": "log", "dtype": "category"}
    for place in range(6):
        row, path = divmod(place, 3)[0], paths[place % 3]
        number = str(place + 1) if place else ""
        metric = list(TWO)[row]
        drawn = {
            (x, y)
            for trace in traces(figure, xaxis=f"x{number}", yaxis=f"y{number}")
            for x, y in zip(trace["x"], trace["y"], strict=True)
        }
        assert drawn == {(trial.values[path], trial.value(metric)) for trial in found.run}
        assert layout[f"xaxis{number}"]["type"] == kinds[path.split(".")[1]]
        if row == 1:
            assert layout[f"xaxis{number}"]["title"]["text"] == path.split(".")[1]
    assert layout["yaxis2"]["matches"] == "y"
    assert layout["yaxis5"]["matches"] == "y4"


def test_slices_begin_with_what_matters_most(search: Any) -> None:
    study = search({"perplexity": "minimize"}, asked=24)
    for number in range(24):
        study.trial(0.1 + 0.01 * (number % 5), 0.2 + 0.01 * number, 3.5 + 0.05 * number)
    study.done()
    layout = figures(study)["study-0-slices"]["layout"]
    assert layout["xaxis"]["title"]["text"] == "share"


def test_one_objective_has_no_front(search: Any) -> None:
    study = search({"perplexity": "minimize"})
    study.trial(0.1, 0.2, 3.5)
    study.done()
    assert list(figures(study)) == ["study-0-history", "study-0-slices"]


def test_a_parameter_that_a_trial_does_not_have_is_left_out(search: Any) -> None:
    study = search({"perplexity": "minimize"})
    study.trial(0.1, 0.2, 3.5)
    study.trial(0.2, 0.2, 3.5)
    study.done()
    study.rows[1]["values"] = {"squeeze_attention.p": 0.2}
    figure = figures(study)["study-0-slices"]
    drawn = {axis: {x for t in traces(figure, xaxis=axis) for x in t["x"]} for axis in ("x", "x2")}
    assert drawn == {"x": {0.1, 0.2}, "x2": {0.2}}


def test_what_users_write_stays_text(search: Any) -> None:
    study = search({"perplexity": "minimize"})
    study.trial(0.1, 0.2, 3.5, fails=ATTACK)
    study.trial(0.2, 0.2, 3.5)
    study.done()
    for row in study.rows:
        row["values"]["evaluate.dtype"] = ATTACK
    page = study.page()
    assert "<img" not in page
    (mark,) = traces(figures(study)["study-0-slices"], xaxis="x3")
    assert "<" not in mark["x"][0]
    assert "<img" not in mark["text"][0]
