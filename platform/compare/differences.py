"""Is one arm's number different from another's? Answered per metric with what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvlab.platform.compare.metrics import Metric
from kvlab.platform.compare.model import Change, Verdict
from kvlab.platform.compare.samples import Sample
from kvlab.platform.compare.statistics import (
    Difference,
    bootstrapped,
    crossed,
    paired,
    separated,
)

Samples = Mapping[str, Sample]
"""Seed -> its sample."""


def log_ratio(metric: Metric, arm: Samples, other: Samples) -> Difference | None:
    """Return log(arm / other), paired over the seeds that both have; None when there is none.

    Counted numbers that do not move from seed to seed are known exactly. Losses are paired over
    seeds and windows of text, or over windows when one seed was run. Timed numbers are paired over
    seeds, or compared by the intervals of their repeats when one seed was run. Void samples, and
    numbers without a logarithm, take no part.
    """
    seeds = [seed for seed in arm if seed in other and _usable(arm[seed]) and _usable(other[seed])]
    if not seeds:
        return None
    ours, theirs = [arm[seed] for seed in seeds], [other[seed] for seed in seeds]
    ratios = [math.log(a.value / b.value) for a, b in zip(ours, theirs, strict=True)]
    if metric.exact and max(ratios) - min(ratios) < 1e-12:
        return Difference(ratios[0], ratios[0], ratios[0], "counted")
    weights = ours[0].weights
    if weights is not None and all(sample.weights == weights for sample in (*ours, *theirs)):
        return _over_windows(ours, theirs, weights)
    if len(ratios) > 1:
        return paired(ratios)
    return _over_repeats(ours[0], theirs[0], ratios[0])


def mean_log_ratio(arm: Samples, other: Samples) -> float | None:
    """Return the estimate of `log_ratio` alone, which costs no interval."""
    ratios = [
        math.log(sample.value / other[seed].value)
        for seed, sample in arm.items()
        if seed in other and _usable(sample) and _usable(other[seed])
    ]
    return sum(ratios) / len(ratios) if ratios else None


def change(metric: Metric, arm: Samples, baseline: Samples) -> Change | None:
    """Return what may be said of `arm` against `baseline`, as a ratio."""
    difference = log_ratio(metric, arm, baseline)
    if difference is None:
        return None
    low, high = difference.low, difference.high
    return Change(
        ratio=math.exp(difference.estimate),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        verdict=verdict(metric, difference),
        basis=difference.basis,
    )


def verdict(metric: Metric, difference: Difference) -> Verdict:
    """Say which way a difference goes, if that is known."""
    if difference.low is None:
        return "no interval"
    if difference.low == difference.high == 0:
        return "equal"
    if not difference.distinguished:
        return "not distinguished"
    lower = difference.estimate < 0
    return "better" if lower == (metric.better == "lower") else "worse"


def _over_windows(
    ours: list[Sample], theirs: list[Sample], weights: tuple[float, ...]
) -> Difference:
    # A seed's slope is the same number for both arms up to the loss it is taken at.
    slopes = [(a.slope + b.slope) / 2 for a, b in zip(ours, theirs, strict=True)]
    table = [
        [slope * (x - y) for x, y in zip(a.windows or (), b.windows or (), strict=True)]
        for a, b, slope in zip(ours, theirs, slopes, strict=True)
    ]
    if len(table) > 1 and len(weights) > 1:
        return crossed(table, weights)
    if len(table) > 1:
        return paired([row[0] for row in table])
    return bootstrapped(table[0], weights)


def _over_repeats(ours: Sample, theirs: Sample, ratio: float) -> Difference:
    bounds = (ours.low, ours.high, theirs.low, theirs.high)
    if any(bound is None or bound <= 0 for bound in bounds):
        return Difference(ratio, None, None, "one seed")
    low, high, other_low, other_high = (math.log(bound) for bound in bounds if bound)
    return separated(
        (math.log(ours.value), low, high), (math.log(theirs.value), other_low, other_high)
    )


def _usable(sample: Sample) -> bool:
    return sample.void is None and sample.value > 0
