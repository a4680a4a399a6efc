"""Fronts and hypervolumes, against counting."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from kvlab.platform.search.quality import (
    hypervolume,
    hypervolumes,
    non_dominated,
    normalised,
    trials_to,
)


def counted(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> int:
    """Unit cells, by their lower corners, that some point is at or below of."""
    cells = itertools.product(*(range(end) for end in reference))
    return sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in cells
    )


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_the_hypervolume_is_what_counting_finds(objectives: int, seed: int) -> None:
    draw = random.Random(seed)
    reference = tuple(draw.randint(4, 9) for _ in range(objectives))
    # Beyond the reference, twice the same and in line with another: all of it.
    points = [
        tuple(draw.randint(0, 10) for _ in range(objectives)) for _ in range(draw.randint(1, 20))
    ]
    points.append(points[0])
    assert hypervolume(points, reference) == counted(points, reference)


def test_nothing_dominates_nothing() -> None:
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, 0.0]], [1.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="1 to 3"):
        hypervolume([[0.0] * 4], [1.0] * 4)


def test_the_front_by_hand() -> None:
    points = [(1, 5), (2, 3), (3, 4), (4, 1), (2, 3), (1, 6)]
    assert non_dominated(points) == [0, 1, 3, 4]
    assert non_dominated([]) == []


def test_the_curve_is_the_hypervolume_of_each_beginning() -> None:
    draw = random.Random(3)
    points = [[draw.random() for _ in range(3)] for _ in range(25)]
    reference = [0.8, 0.9, 1.0]
    expected = [hypervolume(points[: n + 1], reference) for n in range(len(points))]
    assert hypervolumes(points, reference) == pytest.approx(expected)


def test_normalised_by_bounds() -> None:
    found = normalised([[2.0, 5.0], [4.0, 5.0]], [2.0, 5.0], [6.0, 5.0])
    assert found.tolist() == [[0.0, 0.0], [0.5, 0.0]]


def test_trials_to_a_share_of_the_best() -> None:
    curve = [0.0, 0.5, 0.9, 0.95, 1.0]
    assert trials_to(0.95, curve) == 4
    assert trials_to(0.5, curve) == 2
    assert trials_to(0.95, curve, best=1.2) is None
    assert trials_to(0.95, []) is None
    assert math.isclose(curve[trials_to(0.9, curve) - 1], 0.9)  # type: ignore[operator]
