"""The tables of a comparison as plain cells: what the terminal and report.html both draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvlab.platform.compare.formats import (
    change_text,
    cost_text,
    interval_text,
    number_text,
    value_text,
)
from kvlab.platform.compare.metrics import AT_BUDGET, METRICS, QUALITIES, RATES
from kvlab.platform.compare.model import Arm, Column, Comparison, Number, Setting
from kvlab.platform.compare.samples import Recalled

NO_BREAK = "\N{NO-BREAK SPACE}"
Tone = Literal["plain", "better", "worse", "faint", "void", "name"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a cell."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Cell:
    """Lines from the most to the least important; `hint` is what a pointer over it shows."""

    lines: tuple[Line, ...]
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A column's name, and below it what it was measured at."""

    title: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table. Every row begins with the arm's name. remarks: what to read below it."""

    title: str
    caption: str
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remarks: tuple[str, ...] = ()


def main_sheet(comparison: Comparison) -> Sheet:
    """The table that answers the question: one row per arm, the headline of every number."""
    shown = [
        column
        for name in (
            "perplexity",
            "perplexity_per_byte",
            "continuation_perplexity",
            "kl",
            "top1_agreement",
            "identical_tokens",
            "recall",
            "recall_after_cut",
            "tokens_per_second",
            "time_to_first_token",
            "kv_bytes_per_token",
            "served_tokens_per_second",
            "pool_requests",
            "peak_memory_bytes",
        )
        if (column := comparison.headline(name))
    ]
    predicted = comparison.headline("kv_bytes_per_token_predicted")
    trained = any(arm.cost for arm in comparison.arms)
    headings = [Heading("method"), *(_heading(column) for column in shown)]
    if trained:
        headings[1:1] = [Heading("parameters", "body, total")]
        headings.append(Heading("training", "own + before"))
    headings.append(Heading("seeds"))
    rows = []
    for arm in comparison.arms:
        cells = [_name(arm, comparison), *(_cell(arm, column, predicted) for column in shown)]
        if trained:
            cells[1:1] = [_parameters(arm)]
            cells.append(_cost(arm))
        cells.append(_seeds(arm))
        rows.append(tuple(cells))
    return Sheet("Comparison", _caption(comparison), tuple(headings), tuple(rows))


def further_sheets(comparison: Comparison) -> list[Sheet]:
    """Whatever the main table has no room for: other targets, other loads, every batch size."""
    sheets = []
    for setting in comparison.settings:
        columns = [column for column in comparison.columns if column.setting == setting.id]
        if setting.place in QUALITIES:
            shown = [] if any(c.headline for c in columns) else columns
        elif setting.place == "speed":
            shown = _speed_columns(columns)
        else:
            shown = columns
        if shown:
            sheets.append(_setting_sheet(comparison, setting, shown))
        if any(setting.id in arm.cells for arm in comparison.arms):
            sheets.append(_recall_sheet(comparison, setting))
    return sheets


def _speed_columns(columns: Sequence[Column]) -> list[Column]:
    """All rates, decoding at the largest batch, the first token at the smallest, the budget's."""
    rates = [c for c in columns if c.metric == "tokens_per_second"]
    budgeted = any(c.metric == "largest_batch" for c in columns)
    if len(rates) < 2 and not budgeted and any(c.headline for c in columns):
        return []
    wanted = {("decode_tokens_per_second", c.batch) for c in rates[-1:]}
    wanted |= {("time_to_first_token", c.batch) for c in rates[:1]}
    wanted |= {("largest_batch", None), *((rate + AT_BUDGET, None) for rate in RATES)}
    return [*rates, *(c for c in columns if (c.metric, c.batch) in wanted)]


def _setting_sheet(comparison: Comparison, setting: Setting, shown: Sequence[Column]) -> Sheet:
    headings = (Heading("method"), *(_heading(column) for column in shown))
    rows = tuple(
        (_name(arm, comparison, brief=True), *(_cell(arm, column, None) for column in shown))
        for arm in comparison.arms
        if any(arm.number(column.id).value is not None for column in shown)
        or any(arm.number(column.id).missing != "not measured" for column in shown)
    )
    return Sheet(f"{setting.id}: {setting.title}", "", headings, rows)


def _recall_sheet(comparison: Comparison, setting: Setting) -> Sheet:
    """Recall of each arm by task and length, over the depths that stand."""
    arms = [arm for arm in comparison.arms if setting.id in arm.cells]
    places = list(dict.fromkeys((c.task, c.length) for a in arms for c in a.cells[setting.id]))
    headings = [Heading(task.replace("_", " "), f"{length} tokens") for task, length in places]
    rows = [
        (
            _name(arm, comparison, brief=True),
            *(
                _recalled([c for c in arm.cells[setting.id] if (c.task, c.length) == place])
                for place in places
            ),
        )
        for arm in arms
    ]
    title = f"{setting.id}, by length: {setting.title}"
    return Sheet(title, "", (Heading("method"), *headings), tuple(rows))


def _recalled(cells: Sequence[Recalled]) -> Cell:
    standing = [cell for cell in cells if cell.void is None]
    hint = "\n".join(f"depth {c.depth:g}: {c.void or f'{c.accuracy:.0%}'}" for c in cells)
    if not standing:
        return Cell((Line("void", "void"),) if cells else (Line("—", "faint"),), hint)
    lines = [Line(f"{sum(c.accuracy for c in standing) / len(standing):.1%}".replace("%", " %"))]
    if len(standing) < len(cells):
        lines.append(Line(f"{len(cells) - len(standing)} of {len(cells)} depths void", "void"))
    return Cell(tuple(lines), hint)


def _heading(column: Column) -> Heading:
    arrow = "↓" if column.kind.better == "lower" else "↑"
    detail = "" if column.batch is None else f"batch {column.batch}"
    if column.metric in ("perplexity", "perplexity_per_byte"):
        detail = "per token" if column.metric == "perplexity" else "per byte"
        return Heading(f"perplexity {arrow}", detail)
    return Heading(f"{column.kind.title} {arrow}", detail)


def _name(arm: Arm, comparison: Comparison, brief: bool = False) -> Cell:
    on_front = comparison.front is not None and arm.id in comparison.front.members
    lines = [Line(f"◆ {arm.id}" if on_front else f"  {arm.id}", "name")]
    if not brief:
        lines.append(Line(f"  {arm.method}{' · baseline' if arm.baseline else ''}", "faint"))
    hint = f"{arm.method}{' + ' + arm.apply if arm.apply else ''}"
    return Cell(tuple(lines), hint)


def _cell(arm: Arm, column: Column, predicted: Column | None) -> Cell:
    number, metric = arm.number(column.id), column.kind
    if number.value is None:
        return Cell((Line(number.missing or "—", "faint"),))
    text = number_text(metric, number)
    if number.void:
        return Cell((Line("void", "void"), Line(text, "faint")), f"void: {number.void}")
    lines = [Line(text)]
    if len(number.seeds) < number.expected:
        lines.append(Line(f"{len(number.seeds)} of {number.expected} seeds", "worse"))
    if number.unpaired is not None:
        lines.append(Line("other seeds than the baseline", "worse"))
    if number.change is not None:
        lines.append(Line(change_text(column.kind, number.change), _tone(number)))
    if predicted is not None and column.metric == "kv_bytes_per_token":
        other = arm.number(predicted.id)
        if other.value is not None:
            lines.append(
                Line(
                    f"predicted {value_text(predicted.kind, other.value)}".replace(" ", NO_BREAK),
                    "faint",
                )
            )
    return Cell(tuple(lines), _hint(arm, column, number))


def _hint(arm: Arm, column: Column, number: Number) -> str:
    parts = [] if column.kind.exact else [interval_text(column.kind, number)]
    if number.seeds:
        each = ", ".join(
            f"seed {seed}: {value_text(column.kind, value)}" for seed, value in number.seeds.items()
        )
        parts.append(each)
    if number.missing is not None:
        parts.append(number.missing)
    if number.unpaired is not None:
        parts.append(number.unpaired)
    if number.change is not None:
        low, high, ratio = number.change.low, number.change.high, number.change.ratio
        span = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
        amount = f"{number.change.difference:+.4g}" if ratio is None else f"×{ratio:.4g}"
        parts.append(
            f"over {arm.against}: {amount}{span}, {number.change.verdict} ({number.change.basis})"
        )
    return "\n".join(parts)


def _tone(number: Number) -> Tone:
    verdict = number.change.verdict if number.change else None
    return "better" if verdict == "better" else "worse" if verdict == "worse" else "faint"


def _parameters(arm: Arm) -> Cell:
    body, total = arm.number("body_parameters"), arm.number("parameters")
    if body.value is None:
        return Cell((Line(body.missing or "—", "faint"),))
    lines = [Line(value_text(METRICS["body_parameters"], body.value))]
    if total.value is not None:
        lines.append(Line(value_text(METRICS["parameters"], total.value), "faint"))
    return Cell(tuple(lines), f"{body.value:,.0f} outside embeddings and head")


def _cost(arm: Arm) -> Cell:
    if arm.cost is None:
        return Cell((Line(arm.number("train_seconds").missing or "—", "faint"),))
    time, work = cost_text(arm.cost)
    return Cell((Line(time), Line(work, "faint")), "this arm's own training + that of its parents")


def _seeds(arm: Arm) -> Cell:
    """The fewest seeds behind any number of the arm, and how many there were to be."""
    counts = [
        (len(number.seeds), number.expected)
        for number in arm.numbers.values()
        if number.value is not None or number.missing != "not measured"
    ]
    if not counts:
        return Cell((Line("—", "faint"),))
    lacking = [(count, expected) for count, expected in counts if count < expected]
    least, expected = min(lacking or counts)
    if lacking:
        return Cell((Line(f"{least} of {expected}", "worse"),))
    # A job that asked for fewer seeds than the others lacks none, and still has fewer.
    fewer = expected < max(expected for _, expected in counts)
    return Cell((Line(f"{least} of {expected}" if fewer else str(expected)),))


def _caption(comparison: Comparison) -> str:
    parts = ["mean ± standard deviation over seeds"]
    if any(arm.against for arm in comparison.arms):
        parts.append(f"× is the ratio to {comparison.baseline} with its 95 % interval")
        if any(column.headline and column.kind.absolute for column in comparison.columns):
            parts.append("+ and \N{MINUS SIGN} are differences (of shares: in points)")
    if comparison.front is not None:
        columns = [comparison.column(name) for name in comparison.front.columns]
        named = ", ".join(c.kind.title for c in columns if c)
        parts.append(f"◆ on the Pareto front of {named}")
    return "; ".join(parts)
