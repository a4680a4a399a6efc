"""How good a set of points is: its front, its hypervolume, and how soon it got there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def non_dominated(points: ArrayLike) -> list[int]:
    """Return the indices of the points that no other is at least as good as on all, better on one.

    Args:
        points: [N, M], less is better. Equal points share the front.
    """
    table = np.asarray(points, float)
    return [
        number
        for number, point in enumerate(table)
        if not ((table <= point).all(axis=1) & (table < point).any(axis=1)).any()
    ]


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume that the points dominate, up to the reference; exact.

    Args:
        points: [N, M], less is better, M from 1 to 3. Those beyond the reference count nothing.
        reference: [M], as bad as can be.

    Raises:
        ValueError: another shape.
    """
    worst = np.asarray(reference, float)
    table = np.asarray(points, float).reshape(-1, len(worst))
    if not 1 <= len(worst) <= 3:
        raise ValueError(f"hypervolume is of 1 to 3 objectives, found {len(worst)}")
    table = table[(table < worst).all(axis=1)]
    if not len(table):
        return 0.0
    if len(worst) == 1:
        return float(worst[0] - table.min())
    table = table[non_dominated(table)]
    if len(worst) == 2:
        return _area(table, worst)
    # Slices between neighbouring values of the third objective, each as deep as its step.
    table = table[np.argsort(table[:, 2], kind="stable")]
    ends = [*table[1:, 2], worst[2]]
    return sum(
        _area(table[: number + 1, :2], worst[:2]) * float(end - table[number, 2])
        for number, end in enumerate(ends)
        if end > table[number, 2]
    )


def hypervolumes(points: ArrayLike, reference: Sequence[float]) -> list[float]:
    """Return the hypervolume after each point, in the order given; see `hypervolume`."""
    front = np.empty((0, len(reference)))
    found: list[float] = []
    for point in np.asarray(points, float):
        if not found or not (front <= point).all(axis=1).any():
            front = np.vstack([front, point])
            front = front[non_dominated(front)]
            found.append(hypervolume(front, reference))
        else:
            found.append(found[-1])
    return found


def normalised(points: ArrayLike, low: Sequence[float], high: Sequence[float]) -> Array:
    """Return the points [N, M] where low is 0 and high 1; 0 where the two are one.

    Points beyond stay beyond: nothing is clipped.
    """
    start, width = np.asarray(low, float), np.asarray(high, float) - np.asarray(low, float)
    table = np.asarray(points, float) - start
    scaled: Array = np.divide(table, width, out=np.zeros_like(table), where=width != 0)
    return scaled


def trials_to(share: float, curve: Sequence[float], best: float | None = None) -> int | None:
    """Return how many trials it took to reach a share of the best; None: it never did.

    Args:
        curve: what was reached after each trial, never falling.
        best: what could be reached; None: the end of the curve.
    """
    goal = share * (curve[-1] if best is None else best) if len(curve) else 0.0
    return next((number for number, reached in enumerate(curve, 1) if reached >= goal), None)


def _area(points: Array, worst: ArrayLike) -> float:
    """What points [N, 2] dominate: strips from left to right, each up to the lowest so far."""
    right, top = np.asarray(worst, float)
    area, low = 0.0, float(top)
    for x, y in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if y < low:
            area += float(right - x) * (low - float(y))
            low = float(y)
    return area
