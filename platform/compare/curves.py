"""Training curves, read from the store's metric points for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvlab.db.store import Store
from kvlab.platform.compare.labels import arm_name
from kvlab.platform.compare.model import Comparison

KEY = "loss"
MOST = 400
"""Points that a drawn curve has at most."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of one model while it was trained: the mean over its seeds, and their range."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


def read_curves(store: Store, comparison: Comparison) -> dict[str, Curve]:
    """Return model name -> its curve, for every model that logged its loss.

    A model that is used in several ways is one curve: it was trained once.
    """
    found: dict[str, Curve] = {}
    for arm in comparison.arms:
        name = arm_name(arm.job, arm.axes, "")
        if name in found:
            continue
        seeds = [
            {point.step: point.value for point in store.points(job, [KEY])} for job in arm.models
        ]
        curve = _curve([seed for seed in seeds if seed])
        if curve is not None:
            found[name] = curve
    return found


def _curve(seeds: list[Mapping[int, float]]) -> Curve | None:
    """Only steps that every seed reached: a mean over fewer seeds would jump where one ends."""
    if not seeds:
        return None
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    stride = max(1, -(-len(common) // MOST))
    steps = sorted({*common[::stride], *common[-1:]})
    if not steps:
        return None
    columns = [[seed[step] for seed in seeds] for step in steps]
    return Curve(
        steps=tuple(steps),
        mean=tuple(sum(column) / len(column) for column in columns),
        low=tuple(min(column) for column in columns),
        high=tuple(max(column) for column in columns),
        seeds=len(seeds),
    )
