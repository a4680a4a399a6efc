"""Optuna's samplers by name, and what each of them cannot search."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvlab import KvlabError
from kvlab.platform.search.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "nsga2", "gp", "random", "grid", "qmc", "cma-es")
_ALSO_NEEDS = {"gp": ("scipy", "torch"), "qmc": ("scipy",), "cma-es": ("cmaes",)}
"""Packages beside Optuna's own requirements."""
_UNCONDITIONAL = ("gp", "qmc", "cma-es")
"""They draw a dimension that some points lack at random, whatever was learnt. So does nsga2, which
breeds the others."""


def check(name: str, space: Space, objectives: int) -> None:
    """Refuse a sampler that does not exist, is not installed or cannot search the space.

    Imports nothing of Optuna.

    Args:
        objectives: how many there are.

    Raises:
        KvlabError: one line that begins with `sampler`.
    """
    if name not in SAMPLERS:
        close = get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise KvlabError(f"sampler: unknown '{name}': {hint}known: {', '.join(SAMPLERS)}")
    missing = [p for p in ("optuna", *_ALSO_NEEDS.get(name, ())) if find_spec(p) is None]
    if missing:
        what = " ".join(missing)
        raise KvlabError(f"sampler: {name} needs {', '.join(missing)}: pip install {what}")
    conditional = [dimension.path for dimension in space.dimensions if dimension.when is not None]
    if name in _UNCONDITIONAL and conditional:
        raise KvlabError(
            f"sampler: {name} cannot search {_named(conditional)}, which some points lack: choose "
            "tpe, nsga2 or random"
        )
    shared = [dimension.path for dimension in space.dimensions if dimension.when is None]
    if name == "nsga2" and len(shared) < 2:
        raise KvlabError(
            f"sampler: nsga2 breeds what all points have, and of one dimension, here "
            f"{_named(shared)}, it mutates every child: that is random search: choose tpe"
        )
    if name == "grid":
        endless = [dimension.path for dimension in space.dimensions if dimension.count is None]
        if endless:
            raise KvlabError(
                f"sampler: a grid needs a step for {_named(endless)}: give step, or a list"
            )
    if name == "cma-es":
        categorical = [d.path for d in space.dimensions if d.kind == "categorical"]
        if categorical:
            raise KvlabError(
                f"sampler: cma-es cannot search {_named(categorical)}, which is no number: choose "
                "tpe or gp"
            )
        if len(space.dimensions) < 2:
            raise KvlabError("sampler: cma-es needs two dimensions or more: choose tpe or gp")
        if objectives > 1:
            raise KvlabError(
                f"sampler: cma-es has one objective, found {objectives}: choose tpe, nsga2 or gp"
            )


def build(name: str, space: Space, *, objectives: int, seed: int) -> BaseSampler:
    """Return the sampler.

    Constraints need nothing here: samplers read what `Trial.set_constraint` says. Points that are
    still running hold off tpe and gp from their neighbourhood.

    Raises:
        KvlabError: see `check`.
    """
    check(name, space, objectives)
    from optuna import samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `group` is called experimental since 2021
        if name == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        if name == "gp":
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if name == "qmc":
            return samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        if name == "cma-es":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return _grid(seed) if name == "grid" else samplers.RandomSampler(seed=seed)


def _grid(seed: int) -> BaseSampler:
    """Optuna's walk over a tree of choices: GridSampler knows no conditions."""
    from optuna import Study
    from optuna.samplers import BruteForceSampler
    from optuna.trial import FrozenTrial, TrialState

    class Grid(BruteForceSampler):
        def after_trial(
            self,
            study: Study,
            trial: FrozenTrial,
            state: TrialState,
            values: Sequence[float] | None,
        ) -> None:
            """At the end of the grid Optuna's stops `Study.optimize`, which does not run here."""

    return Grid(seed=seed)


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths)
