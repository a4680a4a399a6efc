"""Trials as they train: which of them are not worth ending, by their learning curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kvlab.platform.search.pruners import build
from kvlab.platform.search.rows import Direction

CURVES = {"perplexity": math.exp, "loss": float}
"""Objective -> what a training loss says of it, for as long as nothing else does."""
BEFOREHAND = ("kv_bytes_per_token", "train_flops", "parameters", "body_parameters")
"""Objectives that are predicted before a trial runs; see `Trials.predicted`."""
POINT = "loss"
"""The metric that training jobs log."""


def unwatchable(objectives: Iterable[str]) -> list[str]:
    """The objectives of which nothing is known while a trial trains."""
    return [name for name in objectives if name not in CURVES and name not in BEFOREHAND]


class Watch:
    """Follows the training losses of one study's trials. Used by one thread.

    Args:
        pruner: a name of `pruners.PRUNERS`.
        objectives: directions by name, all of them watchable.
    """

    def __init__(self, pruner: str, objectives: Mapping[str, Direction]) -> None:
        self._objectives = list(objectives)
        self._pruner = build(pruner, objectives)
        self._known: dict[int, Mapping[str, float]] = {}
        self.steps: dict[int, int] = {}
        """Trial -> the last step that it reported."""

    def begin(self, number: int, known: Mapping[str, float]) -> None:
        """A trial begins; of it so much is known beforehand."""
        self._known[number] = known

    def report(self, number: int, points: Iterable[tuple[int, float]]) -> bool:
        """Take (step, loss) as they come; return whether the trial should be stopped."""
        stop = False
        for step, loss in points:
            self.steps[number] = step
            values = dict(self._known[number])
            values |= {name: CURVES[name](loss) for name in self._objectives if name in CURVES}
            if all(math.isfinite(value) for value in values.values()):
                stop |= self._pruner.report(number, step, values)
        return stop

    def ended(self, number: int, *, complete: bool) -> None:
        """A trial is over: one that is complete is a measure for others."""
        if complete:
            self._pruner.finished(number)
        else:
            self._pruner.stopped(number)


def saving(watched: Mapping[int, int], pruned: Iterable[int]) -> dict[str, Any]:
    """What pruning saved: training steps that stopped trials did not make, of all there were.

    Args: watched: trial -> the last step that it reported.
    """
    stopped = [number for number in pruned if number in watched]
    whole = max((step for number, step in watched.items() if number not in stopped), default=0)
    return {
        "trials": stopped,
        "steps": sum(whole - watched[number] for number in stopped),
        "of": whole * len(watched),
    }
