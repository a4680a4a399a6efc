"""The table of what calibrate jobs found."""

from __future__ import annotations

from kvlab.platform.compare.calibrations import Calibration, Measure, ranges
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.sheets import Cell, Heading, Line, Sheet, Tone

STABLE = 0.9
"""Agreement from which it is shown as good."""
_HEADINGS = (
    Heading("calibration"),
    Heading("importance"),
    Heading("layers cut", "by the mean"),
    Heading("samples", "that cut the same"),
    Heading("pairs agree", "on cut or not"),
    Heading("ranks", "correlation"),
    Heading("rows moved", "by fixed budgets"),
    Heading("sections", "agree"),
    Heading("short prompts", "agree with long"),
)


def calibration_sheets(comparison: Comparison) -> list[Sheet]:
    """One table, a row for each importance that a calibrate job measured; none without any."""
    rows = tuple(
        _row(found, measure) for found in comparison.calibrations for measure in found.measures
    )
    return [Sheet("Calibration", "", _HEADINGS, rows)] if rows else []


def _row(found: Calibration, measure: Measure) -> tuple[Cell, ...]:
    p = "p of its own" if found.p is None else f"p {found.p:g}"
    used = f"budgets, {p}" if measure.name == found.importance else "not used"
    cut = ranges(found.cut(measure)) or "none"
    shortest = min(found.lengths, default=None)
    short = Cell((Line("—", "faint"),))
    if measure.name == "cosine" and shortest is not None:
        each = "\n".join(f"{n} tokens: {_percent(a)}" for n, a in found.lengths.items())
        short = _share(found.lengths[shortest], f"at {shortest} tokens", each)
    return (
        Cell((Line(found.id), Line(f"{found.samples} × {found.sequence_length} tokens", "faint"))),
        Cell((Line(measure.name), Line(used, "faint"))),
        Cell((Line(cut), Line(f"of {len(found.kv_layers)}", "faint")), _shares_hint(found)),
        _share(measure.as_mean, f"majority {_percent(measure.as_majority)}"),
        _share(measure.agreement),
        Cell((Line(f"{measure.rank_correlation:.3f}"),)),
        Cell(
            (
                Line(_percent(measure.moved)),
                Line(f"at most {_percent(measure.moved_most)}", "faint"),
            )
        ),
        _share(measure.section_agreement, f"{_percent(measure.sections_moved)} moved"),
        short,
    )


def _share(value: float, beside: str = "", hint: str = "") -> Cell:
    tone: Tone = "better" if value >= STABLE else "plain"
    more = (Line(beside, "faint"),) if beside else ()
    return Cell((Line(_percent(value), tone), *more), hint)


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def _shares_hint(found: Calibration) -> str:
    pairs = zip(found.kv_layers, found.shares, strict=True)
    return "\n".join(f"layer {layer}: {share:.3f} of the average" for layer, share in pairs)
