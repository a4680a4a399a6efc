"""The arms that nothing beats, given what is known about each pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

Ask = Callable[[str, str, str], bool]
"""(metric, arm, other) -> a yes or no about the pair."""
MOST_WINNERS = 3
"""Arms named as beating another: one would do, and each costs intervals to find."""


def front(
    arms: Sequence[str], metrics: Sequence[str], worse: Ask, better: Ask
) -> tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]:
    """Return the arms that no other dominates, and for each of the rest some who dominate it.

    One arm dominates another when it is distinguished as better on at least one metric and on every
    other one it is no worse: neither in its mean, nor paired over the seeds that both have. A
    difference that is not distinguished thus never counts for an arm, and one on the wrong side,
    distinguished or not, always saves the other: noise can only enlarge the front. Dominance
    implies better means, so it has no cycles and the front of a non-empty set is never empty.

    Args:
        worse: whether the arm's mean, or its paired lead, is on the wrong side (cheap).
        better: whether the arm is distinguished as better, mean included (asked only of pairs that
            `worse` leaves).
    """

    def dominates(arm: str, other: str) -> bool:
        return not any(worse(metric, arm, other) for metric in metrics) and any(
            better(metric, arm, other) for metric in metrics
        )

    dominated = {
        arm: beaten_by
        for arm in arms
        if (
            beaten_by := tuple(
                islice((o for o in arms if o != arm and dominates(o, arm)), MOST_WINNERS)
            )
        )
    }
    return tuple(arm for arm in arms if arm not in dominated), dominated
