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


def contrast(metric: Metric, arm: Samples, other: Samples) -> Difference | None:
    """Return how far arm is from other, paired over the seeds that both have; None without any.

    That is log(arm / other), or arm - other where the metric is compared by differences. Counted
    numbers that do not move from seed to seed are known exactly. What was measured window by window
    is paired over seeds and windows, or over windows when one seed was run. Timed numbers are
    paired over seeds, or compared by the intervals of their repeats when one seed was run. Void
    samples, and numbers without a logarithm where one is needed, take no part.
    """
    seeds = _common(metric, arm, other)
    if not seeds:
        return None
    ours, theirs = [arm[seed] for seed in seeds], [other[seed] for seed in seeds]
    apart = [_apart(metric, a, b) for a, b in zip(ours, theirs, strict=True)]
    if metric.exact and max(apart) - min(apart) < 1e-12:
        return Difference(apart[0], apart[0], apart[0], "counted")
    weights = ours[0].weights
    if weights is not None and all(sample.weights == weights for sample in (*ours, *theirs)):
        return _over_windows(ours, theirs, weights)
    if len(apart) > 1:
        return paired(apart)
    if metric.absolute:
        return Difference(apart[0], None, None, "one seed")
    return _over_repeats(ours[0], theirs[0], apart[0])


def mean_contrast(metric: Metric, arm: Samples, other: Samples) -> float | None:
    """Return the estimate of `contrast` alone, which costs no interval."""
    apart = [_apart(metric, arm[seed], other[seed]) for seed in _common(metric, arm, other)]
    return sum(apart) / len(apart) if apart else None


def change(metric: Metric, arm: Samples, baseline: Samples) -> Change | None:
    """Return what may be said of `arm` against `baseline`: a ratio, or a difference."""
    difference = contrast(metric, arm, baseline)
    if difference is None:
        return None
    low, high = difference.low, difference.high
    if metric.absolute:
        said = verdict(metric, difference)
        return Change(None, low, high, said, difference.basis, difference.estimate)
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


def _common(metric: Metric, arm: Samples, other: Samples) -> list[str]:
    """The seeds that both have a usable number of."""
    return [
        seed
        for seed, sample in arm.items()
        if seed in other and _usable(metric, sample) and _usable(metric, other[seed])
    ]


def _apart(metric: Metric, one: Sample, two: Sample) -> float:
    return one.value - two.value if metric.absolute else math.log(one.value / two.value)


def _usable(metric: Metric, sample: Sample) -> bool:
    return sample.void is None and (metric.absolute or sample.value > 0)
