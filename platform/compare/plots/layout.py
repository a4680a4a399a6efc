"""What all plots share: the figure type, colours, axes, and how a user's text is made safe."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.platform.compare.model import Arm, Column, Comparison, Number

Figure = dict[str, Any]
"""A Plotly figure or a part of one, as JSON values."""

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31",
    "#b2182b", "#4d9221",
)  # fmt: skip
BASELINE = "#374151"
_FONT = {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13}
_AXIS = {"gridcolor": "#e5e7eb", "zeroline": False, "linecolor": "#9ca3af", "ticks": "outside"}


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, and what to see in it."""

    id: str
    title: str
    text: str
    data: list[Figure]
    layout: Figure
    wide: bool = False


def colours(comparison: Comparison) -> dict[str, str]:
    """Arm -> colour: the same in every plot and table; the baseline is grey."""
    found: dict[str, str] = {}
    for arm in comparison.arms:
        used = sum(colour != BASELINE for colour in found.values())
        found[arm.id] = BASELINE if arm.baseline else PALETTE[used % len(PALETTE)]
    return found


def layout(x: Figure, y: Figure, legend: bool = True) -> Figure:
    """A figure's layout from its axes."""
    return {
        "font": _FONT,
        "margin": {"l": 64, "r": 24, "t": 16, "b": 56},
        "height": 380,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": {**_AXIS, "automargin": True, **x},
        "yaxis": {**_AXIS, "automargin": True, **y},
        "showlegend": legend,
        # At the foot of the figure, which makes room for it: never over the axis title.
        "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        "hovermode": "closest",
    }


def titled(text: str, **more: Any) -> Figure:
    """An axis with a title."""
    return {"title": {"text": text}, **more}


def measure_axis(column: Column, arms: Sequence[Arm]) -> Figure:
    """The axis of a kind of number, with room for the names of marks at its ends."""
    better = "lower is better" if column.kind.better == "lower" else "higher is better"
    unit = f", {column.kind.unit}" if column.kind.unit and column.kind.unit != "tok/s" else ""
    numbers = [arm.number(column.id) for arm in arms]
    values = [v for n in numbers for v in (n.value, n.low, n.high) if v is not None]
    room = 0.2 * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    # From zero where that leaves the marks apart.
    spread = column.kind.place == "speed" and min(values) < 0.6 * max(values)
    low = 0.0 if spread else min(values) - room
    return titled(f"{short(column)}{unit} ({better})", range=[low, max(values) + room])


def short(column: Column) -> str:
    """A column's name in a title."""
    title = column.kind.title
    return f"{title} at batch {column.batch}" if column.batch and column.kind.timed else title


def bars(numbers: Sequence[Number], colour: str) -> Figure:
    """Error bars that are the 95 % intervals; none where a number has none."""
    known = [(n.value or 0.0, n.low, n.high) for n in numbers]
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if high is None else max(0.0, high - value) for value, _, high in known],
        "arrayminus": [0.0 if low is None else max(0.0, value - low) for value, low, _ in known],
        "thickness": 1.2,
        "width": 4,
        "color": colour,
    }


def safe(text: str) -> str:
    """Plotly reads a small HTML in labels: what users wrote must not be taken for it."""
    return html.escape(text, quote=False)


def faint(colour: str) -> str:
    """The colour of a band around a line of `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
