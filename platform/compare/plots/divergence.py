"""Divergence from the full cache by position after the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvlab.platform.compare.model import Comparison
from kvlab.platform.compare.plots.layout import Chart, layout, safe, titled

TEXT = (
    "Mean KL divergence of the full cache's next token from the cut cache's, at each position of "
    "the text after the prompt."
)


def plot(comparison: Comparison, colour: Mapping[str, str]) -> Iterator[Chart]:
    """Yield a plot for every set of prompts, of the arms that differ from the full cache."""
    for number, setting in enumerate(s for s in comparison.settings if s.place == "divergence"):
        prompt = setting.details["prompt"]
        lines = [
            {
                "type": "scatter",
                "mode": "lines",
                "name": safe(arm.id),
                "x": [prompt + place for place in range(len(curve))],
                "y": list(curve),
                "line": {"color": colour[arm.id], "width": 1.3},
                "connectgaps": True,
            }
            for arm in comparison.arms
            if any(curve := arm.kl_by_position.get(setting.id, ()))
        ]
        if not lines:
            continue
        yield Chart(
            f"divergence-{number}",
            f"Divergence by position: {setting.id}",
            TEXT,
            lines,
            layout(titled("position in the window"), titled("KL, nats", rangemode="tozero")),
            wide=True,
        )
