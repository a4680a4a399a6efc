"""The table of what a study tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvlab.platform.compare.formats import change_text, interval_text, value_text
from kvlab.platform.compare.metrics import metric_of
from kvlab.platform.compare.model import Comparison, Number
from kvlab.platform.compare.sheets import Cell, Heading, Line, Sheet
from kvlab.platform.compare.studies import COMPLETE, Study, Trial
from kvlab.platform.compare.study_words import remarks, setting_text, short_names, title

MOST = 10
"""Trials of a single objective that a terminal shows, and those of one that none is feasible of."""
MOST_FRONT = 20
"""Trials of a front that a terminal shows."""
NONE = Cell((Line("—", "faint"),))


def study_sheets(comparison: Comparison, every: bool = False) -> list[Sheet]:
    """One table for each study.

    Args: every: all trials, by number; else those that lead.
    """
    return [_sheet(study, every) for study in comparison.studies]


def leading(study: Study) -> list[Trial]:
    """The trials that a person wants first: the best ones, or the front.

    Where none meets the constraints, the complete ones that miss the fewest.
    """
    if not study.feasible:
        complete = [trial for trial in study.run if trial.state == COMPLETE]
        return study.ranked(complete)[:MOST]
    if len(study.objectives) == 1:
        return study.ranked(study.feasible)[:MOST]
    return study.ranked(study.trial(number) for number in study.front)[:MOST_FRONT]


def _sheet(study: Study, every: bool) -> Sheet:
    trials = list(study.trials) if every else leading(study)
    names = short_names(study.space)
    headings = (
        Heading("trial"),
        *(Heading(names[path], _range(dimension)) for path, dimension in study.space.items()),
        *(_metric_heading(study, name) for name in study.metrics),
    )
    rows = [_row(study, trial) for trial in trials]
    if study.baseline:
        rows.insert(0, _baseline_row(study))
    more = [] if every else _left_out(study, trials)
    return Sheet(title(study), _caption(study), headings, tuple(rows), (*more, *remarks(study)))


def _left_out(study: Study, shown: Sequence[Trial]) -> list[str]:
    if not study.feasible:
        return ["No trial meets the constraints: those shown miss the fewest."] if shown else []
    several = len(study.objectives) > 1
    rest = len(study.front if several else study.feasible) - len(shown)
    if not rest:
        return []
    what = "on the front" if several else "that meet all constraints" if study.constraints else ""
    return [" ".join(filter(None, (f"{rest} more", what, "are in report.html and the JSON.")))]


def _range(dimension: Mapping[str, Any]) -> str:
    if dimension["kind"] == "categorical":
        return f"{len(dimension['choices'])} choices"
    log = ", log" if dimension["log"] else ""
    return f"{dimension['low']:g} to {dimension['high']:g}{log}"


def _metric_heading(study: Study, name: str) -> Heading:
    metric = metric_of(name, study.objectives.get(name))
    arrow = "↓" if metric.better == "lower" else "↑"
    return Heading(f"{metric.title} {arrow}", "" if name in study.objectives else "constraint")


def _baseline_row(study: Study) -> tuple[Cell, ...]:
    cells = (_number(name, study.baseline.get(name), None) for name in study.metrics)
    name = Cell((Line(f"  {study.against}"), Line("  baseline", "faint")))
    return (name, *(NONE for _ in study.space), *cells)


def _row(study: Study, trial: Trial) -> tuple[Cell, ...]:
    settings = (
        Cell((Line(setting_text(trial.values[path])),), f"{path} {trial.values[path]}")
        if path in trial.values
        else NONE
        for path in study.space
    )
    numbers = (_number(name, trial.numbers.get(name), study.against) for name in study.metrics)
    return (_name(study, trial), *settings, *numbers)


def _name(study: Study, trial: Trial) -> Cell:
    leads = trial.number == study.best if study.best is not None else trial.number in study.front
    lines = [Line(f"{'◆' if leads else ' '} trial {trial.number}")]
    if trial.same_as is not None:
        lines.append(Line(f"  repeats trial {trial.same_as}, not run", "faint"))
    elif trial.state != COMPLETE:
        lines.append(Line(f"  {trial.state}", "worse"))
    lines += [Line(f"  misses {limit}", "worse") for limit in trial.missed]
    beyond = [f"{limit}: beyond by {trial.beyond[limit]:.4g}" for limit in trial.missed]
    return Cell(tuple(lines), "\n".join(filter(None, (trial.message, *beyond))))


def _number(name: str, number: Number | None, against: str | None) -> Cell:
    if number is None or number.value is None:
        return NONE
    metric = metric_of(name)
    text = value_text(metric, number.value)
    hint = [f"seed {seed}: {value_text(metric, value)}" for seed, value in number.seeds.items()]
    if number.void:
        hint.insert(0, f"void: {number.void}")
        return Cell((Line("void", "void"), Line(text, "faint")), "\n".join(hint))
    lines = [Line(text)]
    if not metric.exact:
        if number.low is not None and number.high is not None:
            span = f"{value_text(metric, number.low)} to {value_text(metric, number.high)}"
            lines.append(Line(span, "faint"))
        hint.insert(0, interval_text(metric, number))
    if len(number.seeds) < number.expected:
        lines.append(Line(f"{len(number.seeds)} of {number.expected} seeds", "worse"))
    if number.change is not None:
        lines.append(Line(change_text(metric, number.change), "faint"))
        hint.append(f"over {against}: {number.change.verdict} ({number.change.basis})")
    return Cell(tuple(lines), "\n".join(hint))


def _caption(study: Study) -> str:
    parts = [f"mean over {study.seeds} seeds, below it its 95 % interval"]
    if study.seeds == 1:
        parts = ["one seed; below a number the 95 % interval of its repeats, if there are any"]
    if study.baseline:
        parts.append(f"× is the ratio to {study.against} with its 95 % interval")
        if any(metric_of(name).absolute for name in study.metrics):
            parts.append("+ and \N{MINUS SIGN} are differences (of shares: in points)")
    if study.best is not None:
        parts.append("◆ the best")
    elif study.front:
        names = ", ".join(metric_of(name).title for name in study.objectives)
        parts.append(f"◆ on the front of {names}")
    return "; ".join(parts)
