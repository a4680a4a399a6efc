"""Means, intervals and paired differences: the arithmetic of a comparison.

Every interval is two-sided at 95 % unless `level` says otherwise, and is None where the data cannot
give one (a single seed has no spread). Intervals are per difference: they are not widened for how
many differences a report shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Summary:
    """Repeated measurements of one quantity: mean, sample standard deviation, its interval."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """An estimated difference (on the log scale: the log of a ratio) and its interval."""

    estimate: float
    low: float | None
    high: float | None
    basis: str

    @property
    def distinguished(self) -> bool:
        """Whether the interval exists and leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """Return the p-quantile of Student's t with `df` degrees of freedom (a real number, or inf).

    Inverts the distribution function by bisection; good to seven digits or better.

    Raises:
        ValueError: p outside (0, 1) or df not positive.
    """
    if not 0 < p < 1 or not df > 0:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df > 0, found p={p}, df={df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while _t_upper_tail(high, df) > 1 - p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _t_upper_tail(middle, df) > 1 - p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def summarise(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Describe repeated measurements with Student's t interval of their mean.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("summarise needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def paired(differences: Sequence[float], level: float = LEVEL) -> Difference:
    """Return the mean of one difference per seed, with Student's t over the seeds."""
    s = summarise(differences, level)
    return Difference(s.mean, s.low, s.high, f"paired over {s.n} seeds" if s.n > 1 else "one seed")


def crossed(differences: ArrayLike, weights: ArrayLike, level: float = LEVEL) -> Difference:
    """Return the weighted mean of differences measured for every seed on every window.

    Seeds and windows are both samples (another seed, another text), so both variances count:
    Var = (MS_seed + max(MS_window - MS_rest, 0)) / (S W), with degrees of freedom
    (S - 1) (sum / MS_seed)^2 (the crossed design of Hillis, Stat. Med. 26 (2007), with seeds as its
    readers and windows as its cases).

    Args:
        differences: [S, W], S >= 2 seeds, W >= 2 windows.
        weights: [W], targets scored in each window.

    Raises:
        ValueError: another shape, or fewer than two seeds or windows.
    """
    table, weight = np.asarray(differences, float), np.asarray(weights, float)
    if table.ndim != 2 or min(table.shape) < 2 or weight.shape != table.shape[1:]:
        raise ValueError(f"crossed needs [S>=2, W>=2] and [W], found {table.shape}, {weight.shape}")
    table = table * (weight / weight.mean())
    seeds, windows = table.shape
    mean = float(table.mean())
    by_seed, by_window = table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_window[None, :] + mean
    ms_seed = windows * float(np.square(by_seed - mean).sum()) / (seeds - 1)
    ms_window = seeds * float(np.square(by_window - mean).sum()) / (windows - 1)
    ms_rest = float(np.square(rest).sum()) / ((seeds - 1) * (windows - 1))
    total = ms_seed + max(ms_window - ms_rest, 0.0)
    df = (seeds - 1) * (total / ms_seed) ** 2 if ms_seed > 0 else math.inf
    half = t_quantile((1 + level) / 2, df) * math.sqrt(total / (seeds * windows))
    basis = f"paired over {seeds} seeds and {windows} windows"
    return Difference(mean, mean - half, mean + half, basis)


def bootstrapped(
    differences: ArrayLike, weights: ArrayLike, level: float = LEVEL, seed: int = 0
) -> Difference:
    """Return the weighted mean of one seed's differences, resampling its windows (percentiles).

    The interval speaks of this one training run: it says nothing about another seed.

    Args:
        differences: [W]. weights: [W], targets scored in each window.
    """
    values, weight = np.asarray(differences, float), np.asarray(weights, float)
    if values.ndim != 1 or values.shape != weight.shape or not len(values):
        raise ValueError(f"bootstrapped needs [W] and [W], found {values.shape}, {weight.shape}")
    mean = float((values * weight).sum() / weight.sum())
    windows = len(values)
    if windows < 2:
        return Difference(mean, None, None, "one seed, one window")
    drawn = np.random.default_rng(seed).integers(0, windows, (RESAMPLES, windows))
    means = (values * weight)[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    basis = f"one seed, paired bootstrap over {windows} windows"
    return Difference(mean, float(low), float(high), basis)


def separated(
    estimate: tuple[float, float, float], reference: tuple[float, float, float]
) -> Difference:
    """Return the difference of two independent estimates, each (value, low, high).

    Recovers each one's variance on the side that matters from its own interval (MOVER: Zou &
    Donner, Stat. Med. 27 (2008), equation 7), so skewed intervals stay skewed.
    """
    value, low, high = estimate
    other, other_low, other_high = reference
    difference = value - other
    below = math.hypot(value - low, other_high - other)
    above = math.hypot(high - value, other - other_low)
    return Difference(
        difference, difference - below, difference + above, "intervals of the repeats"
    )


def _t_upper_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0: half the regularised incomplete beta function at df / (df + t^2)."""
    if math.isinf(df) or df > 1e7:
        return 0.5 * math.erfc(t / math.sqrt(2))
    a, total = df / 2, df + t * t
    if df / total < (a + 1) / (a + 2.5):
        return 0.5 * _incomplete_beta(df / total, t * t / total, a, 0.5)
    return 0.5 - 0.5 * _incomplete_beta(t * t / total, df / total, 0.5, a)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) for x < (a + 1) / (a + b + 2) by its continued fraction (A. & S. 26.5.8).

    `rest` is 1 - x, given so that it keeps its digits where x is near 1.
    """
    if x <= 0:
        return 0.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log(rest)
    # From the outside in by Lentz's method: stops as soon as a term changes nothing.
    value = numerators = 1.0
    denominators = 0.0
    for k in range(1, 2000):
        m = k // 2
        if k % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        numerators = 1 + d / numerators
        denominators = 1 / (1 + d * denominators)
        value *= numerators * denominators
        if abs(numerators * denominators - 1) < 1e-15:
            break
    return math.exp(log_front) / (a * value)
