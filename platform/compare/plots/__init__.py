"""The report's plots as plain Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping

from kvlab.platform.compare.curves import Curve
from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.plots import (
    calibration,
    divergence,
    pareto,
    positions,
    recall,
    study,
    throughput,
    training,
)
from kvlab.platform.compare.plots.layout import Chart, colours

__all__ = ["Chart", "charts", "colours"]


def charts(comparison: Comparison, curves: Mapping[str, Curve]) -> list[Chart]:
    """Every plot that there are numbers for."""
    colour = colours(comparison)
    return [
        *pareto.plot(comparison, colour),
        *throughput.plot(comparison, colour),
        *positions.plot(comparison, colour),
        *divergence.plot(comparison, colour),
        *recall.plot(comparison, colour),
        *training.plot(comparison, curves, colour),
        *calibration.plot(comparison),
        *study.plot(comparison),
    ]
