"""The arms that nothing beats, given what is known about each pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Relation = Literal["better", "worse", "equal", "not distinguished", "no interval"]


@dataclass(frozen=True, slots=True)
class Pair:
    """How one arm stands to another on one metric: the verdict, and which way its mean points.

    `mean` is "better", "worse" or "equal": the point estimate alone, whether known or not.
    """

    verdict: Relation
    mean: Literal["better", "worse", "equal"]


def front(
    arms: Sequence[str],
    metrics: Sequence[str],
    compare: Callable[[str, str, str], Pair],
) -> tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]:
    """Return the arms that no other dominates, and for each of the rest who dominates it.

    One arm dominates another when it is distinguished as better on at least one metric and on every
    other one its mean is no worse. A difference that is not distinguished thus never counts for an
    arm, and a mean on the wrong side, distinguished or not, always saves the other: noise can only
    enlarge the front. Dominance implies better means, so it has no cycles and the front of a
    non-empty set is never empty.

    Args:
        compare: (metric, arm, other) -> how `arm` stands to `other`.
    """

    def dominates(arm: str, other: str) -> bool:
        pairs = [compare(metric, arm, other) for metric in metrics]
        return any(pair.verdict == pair.mean == "better" for pair in pairs) and all(
            pair.mean != "worse" for pair in pairs
        )

    dominated = {
        arm: beaten_by
        for arm in arms
        if (beaten_by := tuple(o for o in arms if o != arm and dominates(o, arm)))
    }
    return tuple(arm for arm in arms if arm not in dominated), dominated
