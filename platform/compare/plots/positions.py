"""Loss by position in the window, plain and folded onto one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kvlab.platform.compare.model import Arm, Comparison
from kvlab.platform.compare.plots.layout import Chart, Figure, layout, safe, titled

Curve = Sequence[float | None]
"""The mean loss at each position of a window; None where nothing was scored."""

FOLD = 16
"""Positions that the folded loss shows: a multiple of the usual block lengths."""
SETTLED = 64
"""Leading positions left out when folding: a short context costs loss of its own."""
TEXT = (
    "Mean loss of the targets at each position. A method that sees its past in steps shows as a "
    "saw-tooth: drag to zoom."
)
FOLDED = (
    f"Averaged over positions that are equal modulo {FOLD} (the first {SETTLED} left out): a flat "
    "line is a method that treats all positions alike."
)


def plot(comparison: Comparison, colour: Mapping[str, str]) -> Iterator[Chart]:
    """Yield both plots for every set of targets whose losses were kept by position."""
    for number, setting in enumerate(s for s in comparison.settings if s.place == "quality"):
        curves = [
            (arm, curve)
            for arm in comparison.arms
            if (curve := arm.loss_by_position.get(setting.id))
        ]
        if not curves:
            continue
        yield Chart(
            f"position-{number}",
            f"Loss by position: {setting.id}",
            TEXT,
            [_line(arm, range(len(curve)), curve, colour[arm.id], 1.3) for arm, curve in curves],
            layout(titled("position in the window"), titled("loss, nats")),
            wide=True,
        )
        folded = [
            (arm, means)
            for arm, curve in curves
            if (reference := _reference(arm, setting.id, comparison)) is not None
            and (means := fold(curve, reference))
        ]
        if folded:
            yield Chart(
                f"fold-{number}",
                f"Loss inside a block: {setting.id}",
                FOLDED,
                [_line(arm, range(FOLD), means, colour[arm.id], 2.0) for arm, means in folded],
                layout(
                    titled(f"position modulo {FOLD}", dtick=1),
                    titled(f"loss over {safe(comparison.baseline or '')}, nats"),
                ),
            )


def fold(curve: Curve, reference: Curve) -> list[float] | None:
    """Return curve - reference averaged by position modulo FOLD; None where that is too short.

    Both scored the same targets, so how hard the text is at a position drops out.
    """
    groups: list[list[float]] = [[] for _ in range(FOLD)]
    for position, (value, other) in enumerate(zip(curve, reference, strict=False)):
        if position >= SETTLED and value is not None and other is not None:
            groups[position % FOLD].append(value - other)
    return [sum(group) / len(group) for group in groups] if all(groups) else None


def _reference(arm: Arm, setting: str, comparison: Comparison) -> Curve | None:
    """The curve of the arm's baseline; a baseline is set against itself: a line at zero."""
    other = arm if arm.baseline else comparison.arm(arm.against) if arm.against else None
    return other.loss_by_position.get(setting) if other else None


def _line(
    arm: Arm, x: Sequence[int], y: Sequence[float | None], colour: str, width: float
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": safe(arm.id),
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": width},
    }
