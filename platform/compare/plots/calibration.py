"""Importance of every layer over the samples, and in how many of them it is cut."""

from __future__ import annotations

from collections.abc import Iterator

from kvlab.platform.compare.calibrations import (
    HIGH,
    LOW,
    LOWER,
    UPPER,
    Calibration,
    Measure,
)
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.plots.layout import Chart, Figure, faint, layout, safe, titled

MOST = 8
"""Plots that a report shows; the table has all."""
GROUPS = (
    ("first group: keeps more", "#0072b2"),
    ("second group: keeps more", "#009e73"),
    ("third group: cut", "#d55e00"),
)
GREY = "#6b7280"
AXES = {
    "cosine": "cosine before and after attention",
    "mass": "evenness of attention over keys",
}
TEXT = {
    "cosine": "High: attention changes the stream little, so the layer may keep less.",
    "mass": "Low: attention goes to few keys, so the layer may keep less.",
}
BANDS = (
    "The dark band holds half of the samples, the light one 90 %. Below: the share of samples "
    "whose own groups cut the layer; all or nothing is stable."
)


def plot(comparison: Comparison) -> Iterator[Chart]:
    """Yield a plot for each importance of each calibration."""
    found = [(each, measure) for each in comparison.calibrations for measure in each.measures]
    for number, (calibration, measure) in enumerate(found[:MOST]):
        yield Chart(
            f"calibration-{number}",
            f"Importance of layers: {calibration.id}, {measure.name}",
            f"{calibration.samples} prompts of {calibration.sequence_length} tokens. "
            f"{TEXT.get(measure.name, '')} {BANDS}",
            [*_bands(calibration, measure), *_marks(calibration, measure)],
            _layout(measure),
        )


def _layout(measure: Measure) -> Figure:
    figure = layout(
        titled("layer that owns keys and values", type="category"),
        titled(safe(AXES.get(measure.name, measure.name)), domain=[0.36, 1.0]),
    )
    figure["yaxis2"] = {
        **figure["yaxis"],
        **titled("cut in", domain=[0.0, 0.24], range=[0, 1], tickformat=".0%"),
    }
    figure["xaxis"]["anchor"] = "y2"
    figure["height"] = 460
    return figure


def _bands(calibration: Calibration, measure: Measure) -> Iterator[Figure]:
    x = [str(layer) for layer in calibration.kv_layers]
    edge: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "line": {"width": 0},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    for low, high in ((LOW, HIGH), (LOWER, UPPER)):
        if low in measure.bands and high in measure.bands:
            yield {**edge, "y": list(measure.bands[low])}
            band = {"fill": "tonexty", "fillcolor": faint(GREY)}
            yield {**edge, **band, "y": list(measure.bands[high])}


def _marks(calibration: Calibration, measure: Measure) -> Iterator[Figure]:
    for group, (name, colour) in enumerate(GROUPS):
        of_group = [i for i, own in enumerate(measure.groups) if own == group]
        x = [str(calibration.kv_layers[i]) for i in of_group]
        if not x:
            continue
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "legendgroup": name,
            "x": x,
            "y": [measure.mean[i] for i in of_group],
            "marker": {"size": 9, "color": colour},
        }
        yield {
            "type": "bar",
            "name": name,
            "legendgroup": name,
            "showlegend": False,
            "yaxis": "y2",
            "x": x,
            "y": [measure.cut_share[i] for i in of_group],
            "marker": {"color": colour},
        }
