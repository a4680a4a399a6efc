"""Pruners by name: Optuna's for one objective, dominance for several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING

from kvlab import KvlabError
from kvlab.platform.search.pruning import DominancePruner, Pruner
from kvlab.platform.search.rows import Direction

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.pruners import BasePruner

SINGLE = ("median", "percentile", "successive_halving", "hyperband", "wilcoxon")
"""Optuna's, which know one objective."""
PRUNERS = ("auto", "dominance", *SINGLE)
STARTUP = 5
"""Finished trials before any other is stopped; Optuna's own default."""


def check(name: str, objectives: int) -> None:
    """Refuse a pruner that does not exist, is not installed or does not know so many objectives.

    Raises:
        KvlabError: one line that begins with `pruner`.
    """
    if name not in PRUNERS:
        raise KvlabError(f"pruner: unknown '{name}': known: {', '.join(PRUNERS)}")
    if name in SINGLE and objectives > 1:
        raise KvlabError(
            f"pruner: {name} knows one objective, found {objectives}: choose dominance or auto"
        )
    if name == "wilcoxon" and find_spec("scipy") is None:
        raise KvlabError("pruner: wilcoxon needs scipy: pip install scipy")


def build(name: str, objectives: Mapping[str, Direction]) -> Pruner:
    """Return the pruner.

    `auto` is dominance for several objectives and the median for one: it needs no scale of steps,
    and a study of tens of trials leaves each of Hyperband's brackets with too few to compare.

    Raises:
        KvlabError: see `check`.
    """
    check(name, len(objectives))
    if name == "auto":
        name = "dominance" if len(objectives) > 1 else "median"
    if name == "dominance":
        return DominancePruner(objectives, startup=STARTUP)
    ((objective, direction),) = objectives.items()
    return OptunaPruner(name, objective, direction)


class OptunaPruner:
    """One of Optuna's pruners, over a study of its own that holds curves alone.

    A step counts from 0. `wilcoxon` takes the number of a prompt or a seed for its step: it stops a
    trial that is worse than the best one on the same prompts, whose mean is what it compares.

    Args:
        objective: its name in what is reported; a report without it changes nothing.
    """

    def __init__(self, name: str, objective: str, direction: Direction) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._objective = objective
        self._mean = name == "wilcoxon"
        # Hyperband deals trials to brackets by the study's name: a random one is not repeatable.
        self._study = optuna.create_study(
            direction=direction, pruner=_pruner(name), study_name="curves"
        )
        self._trials: dict[int, Trial] = {}

    def report(self, number: int, step: int, values: Mapping[str, float]) -> bool:
        if self._objective not in values:
            return False
        trial = self._trials.get(number)
        if trial is None:
            trial = self._trials[number] = self._study.ask()
        trial.report(values[self._objective], step)
        return trial.should_prune()

    def finished(self, number: int) -> None:
        from optuna.trial import TrialState

        trial = self._trials.pop(number, None)
        if trial is None:
            return
        curve = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        value = fmean(curve.values()) if self._mean else curve[max(curve)]
        if math.isfinite(value):
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def stopped(self, number: int) -> None:
        from optuna.trial import TrialState

        trial = self._trials.pop(number, None)
        if trial is not None:
            self._study.tell(trial, state=TrialState.PRUNED)


def _pruner(name: str) -> BasePruner:
    from optuna import pruners

    if name == "median":
        return pruners.MedianPruner(n_startup_trials=STARTUP)
    if name == "percentile":
        return pruners.PercentilePruner(25.0, n_startup_trials=STARTUP)
    if name == "successive_halving":
        return pruners.SuccessiveHalvingPruner()
    if name == "hyperband":
        return pruners.HyperbandPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # called experimental since 2024
        return pruners.WilcoxonPruner()
