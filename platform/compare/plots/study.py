"""A study: its front, how soon it got there, what mattered, and each objective by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from kvlab.platform.compare.formats import interval_text, value_text
from kvlab.platform.compare.metrics import metric_of
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.plots.layout import (
    BASELINE,
    PALETTE,
    Chart,
    Figure,
    layout,
    safe,
    titled,
)
from kvlab.platform.compare.studies import COMPLETE, Study, Trial
from kvlab.platform.compare.study_words import setting_text, settings, short_names

MOST = 4
"""Studies that a report draws; the tables have all."""
MOST_SLICES = 6
"""Parameters that slices are drawn of: the most important ones where that is known."""
LEADING, FEASIBLE, MISSING = "#0072b2", "#56b4e9", "#9ca3af"
POINT = "Point at a mark for its trial."
FRONT = f"Blue: no other trial is better on every objective. Hollow: misses a constraint. {POINT}"
HISTORY = "By number of the trial; the line is the best so far of those that meet the constraints."
VOLUME = " Below: share of the box from the best to beyond the worst values that the front covers."
SHARES = "Share of each parameter in telling the best trials from the rest (PED-ANOVA)."
SLICES = f"Every complete trial, by each parameter alone: the others vary too. {POINT}"


def plot(comparison: Comparison) -> Iterator[Chart]:
    """Yield the plots of each study that completed a trial."""
    for number, study in enumerate(comparison.studies[:MOST]):
        if not any(trial.state == COMPLETE for trial in study.run):
            continue
        name = f"study-{number}"
        if len(study.objectives) > 1:
            yield _front(name, study)
        yield _history(name, study)
        if study.importances:
            yield _importances(name, study)
        yield _slices(name, study)


def _front(name: str, study: Study) -> Chart:
    first, second = list(study.objectives)[:2]
    # Quality goes upward, as in every other plot.
    x, y = (second, first) if metric_of(first).quality else (first, second)
    data = list(_marks(study, study.run, lambda t: t.value(x), lambda t: t.value(y)))
    if len(study.objectives) == 2:
        members = sorted((study.trial(n) for n in study.front), key=lambda t: t.value(x))
        data.insert(0, _line([t.value(x) for t in members], [t.value(y) for t in members], LEADING))
        data[0]["line"] |= {"dash": "dot", "shape": _step(study, x)}
    across, up = _baseline(study, x), _baseline(study, y)
    if across is not None and up is not None:
        mark = {"size": 12, "symbol": "square", "color": BASELINE}
        named = safe(f"{study.against}, baseline")
        data.append({**_scatter([across], [up]), "name": named, "marker": mark})
    more = "" if len(study.objectives) == 2 else " Other objectives are not drawn."
    title = f"{metric_of(y).title} against {metric_of(x).title}: {study.id}"
    return Chart(f"{name}-front", title, FRONT + more, data, layout(_axis(x), _axis(y)))


def _history(name: str, study: Study) -> Chart:
    objectives, progress = list(study.objectives), study.progress
    rows = len(objectives) + bool(progress.hypervolume)
    figure = layout(titled("trial"), {})
    data: list[Figure] = []
    for row, metric in enumerate(objectives):
        own = {"yaxis": _nth("y", row)}
        marks = _marks(study, study.run, lambda t: t.number, lambda t, m=metric: t.value(m))
        data += [{**mark, **own, "showlegend": not row} for mark in marks]
        best = _line(progress.trials, progress.best[metric], LEADING)
        data.append({**best, **own, "name": "best so far", "showlegend": not row})
        base = _baseline(study, metric)
        if base is not None:
            flat = _line([progress.trials[0], progress.trials[-1]], [base] * 2, BASELINE)
            flat["line"]["dash"] = "dash"
            named = safe(f"{study.against}, baseline")
            data.append({**flat, **own, "name": named, "showlegend": not row})
    if progress.hypervolume:
        volume = _line(progress.trials, progress.hypervolume, PALETTE[2])
        data.append({**volume, "yaxis": _nth("y", rows - 1), "name": "hypervolume"})
    titles = [_axis(metric) for metric in objectives]
    if progress.hypervolume:
        titles.append(titled("hypervolume", tickformat=".0%", rangemode="tozero"))
    plain = dict(figure["yaxis"])
    for row, axis in enumerate(titles):
        figure[_nth("yaxis", row)] = {**plain, **axis, "domain": _span(rows, row, True)}
    figure["xaxis"]["anchor"] = _nth("y", rows - 1)
    figure["height"] = 160 + 200 * rows
    text = HISTORY + (VOLUME if progress.hypervolume else "")
    return Chart(f"{name}-history", f"History: {study.id}", text, data, figure)


def _importances(name: str, study: Study) -> Chart:
    names = short_names(study.space)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": metric_of(objective).title,
            "y": [safe(names[path]) for path in shares],
            "x": list(shares.values()),
            "marker": {"color": PALETTE[number % len(PALETTE)]},
        }
        for number, (objective, shares) in enumerate((study.importances or {}).items())
    ]
    figure = layout(titled("share", range=[0, 1], tickformat=".0%"), {"type": "category"})
    # The largest on top.
    figure["yaxis"]["autorange"] = "reversed"
    return Chart(f"{name}-importances", f"Importance: {study.id}", SHARES, data, figure)


def _slices(name: str, study: Study) -> Chart:
    paths, objectives = _sliced(study), list(study.objectives)
    names = short_names(study.space)
    figure = layout({}, {})
    across, up, data = dict(figure["xaxis"]), dict(figure["yaxis"]), []
    for row, metric in enumerate(objectives):
        for column, path in enumerate(paths):
            place = row * len(paths) + column
            figure[_nth("xaxis", place)] = {
                **across,
                **_dimension(study, path, names[path] if row == len(objectives) - 1 else ""),
                "domain": _span(len(paths), column),
                "anchor": _nth("y", place),
            }
            figure[_nth("yaxis", place)] = {
                **up,
                **(_axis(metric) if not column else {"showticklabels": False}),
                "domain": _span(len(objectives), row, True),
                "anchor": _nth("x", place),
                **({"matches": _nth("y", row * len(paths))} if column else {}),
            }
            having = [trial for trial in study.run if path in trial.values]
            marks = _marks(
                study, having, lambda t, p=path: _shown(study, t, p), lambda t, m=metric: t.value(m)
            )
            own = {"xaxis": _nth("x", place), "yaxis": _nth("y", place)}
            data += [{**mark, **own, "showlegend": not place} for mark in marks]
    figure["height"] = 160 + 220 * len(objectives)
    text = SLICES
    if len(paths) < len(study.space):
        text += f" {len(paths)} of {len(study.space)} parameters."
    return Chart(f"{name}-slices", f"Slices: {study.id}", text, data, figure, wide=True)


def _sliced(study: Study) -> list[str]:
    ranked = next(iter((study.importances or {}).values()), {})
    return sorted(study.space, key=lambda path: -ranked.get(path, 0.0))[:MOST_SLICES]


def _marks(study: Study, trials: Sequence[Trial], x: Any, y: Any) -> Iterator[Figure]:
    """Complete trials in three groups; x and y are what a trial has on either axis."""
    leads = "best" if study.best is not None else "on the front"
    leading = study.front if study.best is None else (study.best,)
    complete = [trial for trial in trials if trial.state == COMPLETE]
    groups = (
        ("misses a constraint", MISSING, [t for t in complete if not t.feasible]),
        ("feasible", FEASIBLE, [t for t in complete if t.feasible and t.number not in leading]),
        (leads, LEADING, [t for t in complete if t.number in leading]),
    )
    for label, colour, members in groups:
        if members:
            symbol = "circle-open" if colour == MISSING else "circle"
            yield {
                **_scatter([x(t) for t in members], [y(t) for t in members]),
                "name": label,
                "legendgroup": label,
                "text": [_hover(study, trial) for trial in members],
                "hoverinfo": "text",
                "marker": {"size": 9, "symbol": symbol, "color": colour},
            }


def _hover(study: Study, trial: Trial) -> str:
    lines = [f"trial {trial.number}", *settings(study, trial)]
    for name in study.metrics:
        metric, number = metric_of(name), trial.numbers[name]
        beside = f"void: {number.void}" if number.void else interval_text(metric, number)
        beside = f" ({beside})" if number.void or not metric.exact else ""
        lines.append(f"{metric.title} {value_text(metric, trial.value(name))}{beside}")
    lines += [f"misses {limit}" for limit in trial.missed]
    return "<br>".join(map(safe, lines))


def _baseline(study: Study, metric: str) -> float | None:
    """What the baseline measured, where that can be drawn."""
    value = study.baseline[metric].value if metric in study.baseline else None
    return value if value is not None and isfinite(value) else None


def _shown(study: Study, trial: Trial, path: str) -> Any:
    value = trial.values[path]
    if study.space[path]["kind"] == "categorical":
        return safe(setting_text(value))
    return value


def _dimension(study: Study, path: str, name: str) -> Figure:
    dimension = study.space[path]
    kind = "linear"
    if dimension["kind"] == "categorical":
        kind = "category"
    elif dimension["log"]:
        kind = "log"
    return titled(safe(name), type=kind)


def _axis(name: str) -> Figure:
    metric = metric_of(name)
    unit = f", {metric.unit}" if metric.unit and metric.unit != "tok/s" else ""
    percent = {"tickformat": ".0%"} if metric.unit == "%" else {}
    return titled(f"{metric.title}{'' if percent else unit} ({metric.better} is better)", **percent)


def _step(study: Study, x: str) -> str:
    """How a line along the front turns: what is reached at x stays reached where x is worse."""
    return "hv" if study.objectives[x] == "minimize" else "vh"


def _scatter(x: Sequence[Any], y: Sequence[Any]) -> Figure:
    return {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y)}


def _line(x: Sequence[Any], y: Sequence[Any], colour: str) -> Figure:
    return {
        **_scatter(x, y),
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "line": {"color": colour, "width": 2, "shape": "hv"},
    }


def _nth(axis: str, number: int) -> str:
    """Plotly's name of an axis, counted from 0: `y`, `y2`, ..."""
    return axis if not number else f"{axis}{number + 1}"


def _span(count: int, number: int, downward: bool = False) -> list[float]:
    """What part of a figure the next of several axes takes."""
    gap = 0.05 if count > 1 else 0.0
    size = (1 - gap * (count - 1)) / count
    start = number * (size + gap)
    low = 1 - start - size if downward else start
    # Plotly refuses what rounding leaves outside of the figure.
    return [max(0.0, low), min(1.0, low + size)]
