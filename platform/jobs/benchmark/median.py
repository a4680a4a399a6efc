"""Repeated timings as a median with an interval that assumes no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95


def summarise(samples: Sequence[float]) -> dict[str, Any]:
    """Return {median, low, high, coverage, samples} of at least one timing.

    low and high are the narrowest pair of order statistics that holds the true median with a
    probability (`coverage`, from the binomial distribution) of 95 % or more; with fewer than six
    samples no pair does, and they are the extremes: 93.75 % at five.
    """
    ordered, n = sorted(samples), len(samples)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    below = 0
    while below + 1 < n // 2 and _coverage(n, below + 1) >= LEVEL:
        below += 1
    return {
        "median": middle,
        "low": ordered[below],
        "high": ordered[n - 1 - below],
        "coverage": _coverage(n, below),
        "samples": list(samples),
    }


def _coverage(n: int, below: int) -> float:
    """Probability that the median lies between the order statistics `below` from either end."""
    outside = sum(math.comb(n, k) for k in range(below + 1)) / float(2**n)
    return max(0.0, 1 - 2 * outside)
