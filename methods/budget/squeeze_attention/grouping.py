"""SqueezeAttention's groups of layers: an exact one-dimensional 3-means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

GROUPS = 3


def three_means(values: Sequence[float]) -> list[int]:
    """Return each value's group: 0 has the lowest centre, 2 the highest.

    The cut into three runs of the sorted values that has the least sum of squares, found by trying
    all pairs of cut points; the first of equals. Equal values are never parted. Deterministic,
    where the reference's k-means is unseeded and ends in local optima.

    With fewer than three different values there are as many groups as values, the highest being 2:
    of values that are all equal none is unimportant, so all are in group 0.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    ordered = [values[i] for i in order]
    sums = [0.0, *accumulate(ordered)]
    squares = [0.0, *accumulate(value * value for value in ordered)]

    def spread(start: int, stop: int) -> float:
        total = sums[stop] - sums[start]
        return squares[stop] - squares[start] - total * total / (stop - start)

    starts = [i for i in range(1, len(ordered)) if ordered[i] > ordered[i - 1]]
    n = len(ordered)
    if not starts:
        return [0] * n
    if len(starts) == 1:
        first = second = starts[0]
    else:
        _, first, second = min(
            (spread(0, a) + spread(a, b) + spread(b, n), a, b)
            for i, a in enumerate(starts)
            for b in starts[i + 1 :]
        )
    groups = [0] * n
    for place, layer in enumerate(order):
        groups[layer] = (place >= first) + (place >= second)
    return groups
