"""From one study to another: which of its points are worth more than they have cost so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from kvlab import KvlabError
from kvlab.platform.search.quality import Array, non_dominated
from kvlab.platform.search.rows import Direction, Row, losses
from kvlab.platform.search.space import Space, Values


def promoted(
    trials: Sequence[Mapping[str, Any]],
    objectives: Mapping[str, Direction],
    space: Space,
    most: int,
) -> list[Values]:
    """Return the best points of an earlier study that another space has a place for, best first.

    Args:
        trials: of the earlier study's result. objectives: its own.
        space: of the later study. What only the earlier one varied is left out of a point, what
            only the later one varies lacks; points that then are alike count once.
        most: points wanted.
    """
    columns = Row.__dataclass_fields__
    rows = [Row(**{name: trial[name] for name in columns}) for trial in trials]
    paths = {dimension.path for dimension in space.dimensions}
    found: list[Values] = []
    for row in ranked(rows, objectives):
        shared = {path: value for path, value in row.values.items() if path in paths}
        with suppress(KvlabError):  # beyond a range of the later study
            point = space.admit(shared, partial=True)
            if point and point not in found:
                found.append(point)
        if len(found) == most:
            break
    return found


def ranked(rows: Sequence[Row], objectives: Mapping[str, Direction]) -> list[Row]:
    """Return the feasible trials, best first: front by front, the lonely first within a front.

    The order of NSGA-II (Deb et al. 2002): by non-domination, then by crowding distance; with one
    objective simply by that. What repeats another trial is left out.
    """
    left = [row for row in rows if row.feasible and row.source != "repeat"]
    found: list[Row] = []
    while left:
        points = np.asarray([losses(row.objectives, objectives) for row in left], float)
        front = non_dominated(points)
        distances = crowding(points[front])
        order = sorted(range(len(front)), key=lambda i: (-distances[i], left[front[i]].number))
        found += [left[front[i]] for i in order]
        left = [row for number, row in enumerate(left) if number not in front]
    return found


def crowding(points: Array) -> list[float]:
    """Return how far each point's neighbours are apart, added up over objectives; ends are alone.

    Args: points: [N, M].
    """
    distances = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if width > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return [float(distance) for distance in distances]
