"""Tokens per second against batch size, one plot per benchmark setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlab.platform.compare.model import Comparison, Setting
from kvlab.platform.compare.plots.layout import Chart, Figure, bars, layout, safe, titled


def plot(comparison: Comparison, colour: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a plot for every setting that was measured at several batch sizes."""
    for number, setting in enumerate(s for s in comparison.settings if s.place == "speed"):
        lines, batches = _lines(comparison, setting, colour)
        if len(batches) < 2 or not lines:
            continue
        x = titled("sequences per batch", tickvals=batches, type="log")
        yield Chart(
            f"throughput-{number}",
            f"Throughput by batch: {setting.id}",
            f"Generated tokens per second, prefill included; {setting.title}.",
            lines,
            layout(x, titled("tokens/s", rangemode="tozero")),
        )


def _lines(
    comparison: Comparison, setting: Setting, colour: Mapping[str, str]
) -> tuple[list[Figure], list[int | None]]:
    columns = [
        column
        for column in comparison.columns
        if column.setting == setting.id and column.metric == "tokens_per_second"
    ]
    lines = []
    for arm in comparison.arms:
        found = [(c.batch, n) for c in columns if (n := arm.number(c.id)).stands]
        if found:
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": safe(arm.id),
                    "x": [batch for batch, _ in found],
                    "y": [number.value for _, number in found],
                    "line": {"color": colour[arm.id], "width": 2},
                    "marker": {"size": 7},
                    "error_y": bars([number for _, number in found], colour[arm.id]),
                }
            )
    return lines, [column.batch for column in columns]
