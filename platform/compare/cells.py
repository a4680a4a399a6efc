"""Recall by task, length and depth: the mean over seeds of each cell."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.platform.compare.samples import Recalled


def mean_cells(seeds: Sequence[tuple[Recalled, ...]]) -> tuple[Recalled, ...]:
    """Return each cell's mean over the seeds in which it stands; void where it stands in none."""
    found: dict[tuple[str, int, float], list[Recalled]] = {}
    for cells in seeds:
        for cell in cells:
            found.setdefault((cell.task, cell.length, cell.depth), []).append(cell)
    return tuple(_mean(cells) for cells in found.values())


def _mean(cells: Sequence[Recalled]) -> Recalled:
    shown = [cell for cell in cells if cell.void is None] or cells
    first = shown[0]
    return Recalled(
        first.task,
        first.length,
        first.depth,
        sum(cell.accuracy for cell in shown) / len(shown),
        sum(cell.full_accuracy for cell in shown) / len(shown),
        first.void,
    )
