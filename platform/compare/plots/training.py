"""The training loss of every model, seeds as a band."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlab.platform.compare.curves import Curve
from kvlab.platform.compare.labels import arm_name
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.plots.layout import (
    BASELINE,
    Chart,
    Figure,
    faint,
    layout,
    safe,
    titled,
)


def plot(
    comparison: Comparison, curves: Mapping[str, Curve], colour: Mapping[str, str]
) -> Iterator[Chart]:
    """Yield one plot of all curves, if there are any."""
    if not curves:
        return
    owner = {arm_name(a.job, a.axes, ""): colour[a.id] for a in reversed(comparison.arms)}
    data: list[Figure] = []
    for name, curve in curves.items():
        data.extend(_lines(name, curve, owner.get(name, BASELINE)))
    yield Chart(
        "training",
        "Training",
        "Mean over seeds and their range, by step of each model's own training.",
        data,
        layout(titled("step"), titled("training loss, nats")),
    )


def _lines(name: str, curve: Curve, colour: str) -> Iterator[Figure]:
    base: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": list(curve.steps),
        "legendgroup": safe(name),
    }
    if curve.seeds > 1:
        edge = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        yield {**base, **edge, "y": list(curve.low)}
        yield {
            **base,
            **edge,
            "y": list(curve.high),
            "fill": "tonexty",
            "fillcolor": faint(colour),
        }
    line = {"color": colour, "width": 2}
    yield {**base, "name": safe(name), "y": list(curve.mean), "line": line}
