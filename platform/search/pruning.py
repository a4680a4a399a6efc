"""Which running trials to stop: those whose learning curves are dominated.

Optuna prunes studies of one objective alone. For several, a trial is stopped when finished trials
were better than it is at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvlab.platform.search.rows import Direction

Curve = Sequence[tuple[int, Mapping[str, float]]]
"""(step, objectives measured at it), steps rising. Not every step measures every objective."""


class Pruner(Protocol):
    """What watches the trials of one study as they report. Used by one thread."""

    def report(self, number: int, step: int, values: Mapping[str, float]) -> bool:
        """Take what a trial measured at a step; return whether it should be stopped."""

    def finished(self, number: int) -> None:
        """A trial reached its end: others are measured by it from now on."""

    def stopped(self, number: int) -> None:
        """A trial was stopped or failed: it ends without being a measure for others."""


def dominated(
    running: Curve, finished: Curve, objectives: Mapping[str, Direction], margin: float
) -> bool:
    """Whether a finished trial's curve is better than that of a running one, as far as that goes.

    Each objective that the running trial has measured is compared at the largest step at which both
    have it; one that they never share a step of saves it. The finished trial must be better by more
    than the margin on at least one objective, and on every other one either that or exactly equal.

    Args:
        margin: relative to the finished trial's number.
    """
    ahead = False
    for name, direction in objectives.items():
        mine = {step: values[name] for step, values in running if name in values}
        if not mine:
            continue
        others = {step: values[name] for step, values in finished if name in values}
        common = mine.keys() & others.keys()
        if not common:
            return False
        own, other = mine[max(common)], others[max(common)]
        lead = own - other if direction == "minimize" else other - own
        if lead > margin * abs(other):
            ahead = True
        elif own != other:
            return False
    return ahead


class DominancePruner:
    """Stops a trial that finished ones dominate.

    It sees the objectives that were reported and no others: what is known of a trial beforehand,
    such as its bytes, belongs into its first report. Else a small cache is stopped for its loss.

    Args:
        objectives: directions by name.
        margin: by which a finished trial must be better, relative; against noise.
        grace: share of a finished trial's steps below which it judges nobody.
        startup: finished trials before any other is stopped.
        by: how many finished trials must dominate one.
    """

    def __init__(
        self,
        objectives: Mapping[str, Direction],
        *,
        margin: float = 0.02,
        grace: float = 0.2,
        startup: int = 5,
        by: int = 1,
    ) -> None:
        self._objectives = dict(objectives)
        self._margin, self._grace, self._startup, self._by = margin, grace, startup, by
        self._running: dict[int, list[tuple[int, Mapping[str, float]]]] = {}
        self._finished: list[Curve] = []

    def report(self, number: int, step: int, values: Mapping[str, float]) -> bool:
        curve = self._running.setdefault(number, [])
        curve.append((step, dict(values)))
        if len(self._finished) < self._startup:
            return False
        judges = sum(
            step >= self._grace * other[-1][0]
            and dominated(curve, other, self._objectives, self._margin)
            for other in self._finished
        )
        return judges >= self._by

    def finished(self, number: int) -> None:
        curve = self._running.pop(number, None)
        if curve:
            self._finished.append(curve)

    def stopped(self, number: int) -> None:
        self._running.pop(number, None)
