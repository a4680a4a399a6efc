"""Quality against speed against KV bytes: one plot for each pair of the front's metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from kvlab.platform.compare.model import Arm, Column, Comparison
from kvlab.platform.compare.plots.layout import (
    Chart,
    Figure,
    bars,
    layout,
    measure_axis,
    safe,
    short,
)

MOST_LABELS = 8
"""Marks that are named beside themselves; more are named in a legend."""
TEXT = "Bars are 95 % intervals; a hollow mark is off the front; a square is the baseline."


def plot(comparison: Comparison, colour: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a plot for every pair of metrics that at least two arms have."""
    if comparison.front is None:
        return
    columns = [column for name in comparison.front.columns if (column := comparison.column(name))]
    for number, (first, second) in enumerate(combinations(columns, 2)):
        # Quality goes upward wherever it is shown, the price of it to the right.
        x, y = (second, first) if first.kind.quality else (first, second)
        shown = [a for a in comparison.arms if a.number(x.id).stands and a.number(y.id).stands]
        if len(shown) < 2:
            continue
        crowded = len(shown) > MOST_LABELS
        across, up = measure_axis(x, shown), measure_axis(y, shown)
        middle = sum(across["range"]) / 2
        yield Chart(
            f"pareto-{number}",
            f"{short(y)} against {short(x)}",
            TEXT,
            [
                _mark(arm, x, y, colour[arm.id], arm.id in comparison.front.members)
                | {
                    "mode": "markers" if crowded else "markers+text",
                    # Beside the error bar, and away from the nearer edge.
                    "textposition": "top right"
                    if (arm.number(x.id).value or 0.0) < middle
                    else "top left",
                }
                for arm in shown
            ],
            layout(across, up, legend=crowded),
        )


def _mark(arm: Arm, x: Column, y: Column, colour: str, on_front: bool) -> Figure:
    across, up = arm.number(x.id), arm.number(y.id)
    symbol = "square" if arm.baseline else "circle"
    return {
        "type": "scatter",
        "name": safe(arm.id),
        "x": [across.value],
        "y": [up.value],
        "error_x": bars([across], colour),
        "error_y": bars([up], colour),
        "text": [safe(arm.id)],
        "textfont": {"color": colour, "size": 12},
        "cliponaxis": False,
        "marker": {
            "size": 12,
            "symbol": symbol if on_front else f"{symbol}-open",
            "color": colour,
            "line": {"width": 2, "color": colour},
        },
    }
