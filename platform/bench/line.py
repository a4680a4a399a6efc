"""One line of the bench: a number of ours, the number it is compared with, and the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Literal

from kvlab.platform.jobs.benchmark.median import summarise


@dataclass(frozen=True, slots=True)
class Line:
    """One measured comparison.

    Attributes:
        name: what was measured. unit: of `ours` and `theirs`.
        theirs: the other side's number in the same run, None where there is no other side.
        beside: what the other side is.
        better: which way is good.
        least_ratio: target of `ratio`. limit: target of `ours` itself.
        void: why the number may not be used (the compared things were not equal); empty if it may.
        detail: samples and settings, for the JSON.
    """

    name: str
    unit: str
    ours: float
    theirs: float | None = None
    beside: str = ""
    better: Literal["more", "less"] = "more"
    least_ratio: float | None = None
    limit: float | None = None
    void: str = ""
    detail: dict[str, Any] | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better ours is; None where there is no other side or the line is void."""
        if self.theirs is None or self.void:
            return None
        if self.better == "more":
            return self.ours / self.theirs
        return self.theirs / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the targets are reached; None without a target. A void line reaches none."""
        if self.least_ratio is None and self.limit is None:
            return None
        if self.void:
            return False
        reached = True
        if self.least_ratio is not None:
            reached = self.ratio is not None and self.ratio >= self.least_ratio
        if self.limit is not None:
            good = self.ours >= self.limit if self.better == "more" else self.ours <= self.limit
            reached = reached and good
        return reached


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = perf_counter()
    action()
    return perf_counter() - start


def interleaved(
    first: Callable[[], object], second: Callable[[], object], *, warmup: int, repeats: int
) -> tuple[list[float], list[float]]:
    """Time two actions in turn, so that a slow spell of the machine hits both.

    Returns:
        the seconds of each repeat of either, warm-up left out.
    """
    for _ in range(warmup):
        first()
        second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def middle(samples: list[float]) -> float:
    """The median of the samples."""
    return float(median(samples))


def not_slower(mine: list[float], other: list[float]) -> float:
    """The least ratio of the medians that still is not slower beyond the interval.

    That is 1 less the upper half of the paired ratio's interval, as printed: its upper end reaches
    1 exactly when the ratio reaches this.
    """
    found = summarise([b / a for a, b in zip(mine, other, strict=True)])
    return hundredths(1.0 - max(0.0, found["high"] - middle(other) / middle(mine)))


def hundredths(target: float) -> float:
    """The target as it is printed, rounded up."""
    return math.ceil(target * 100) / 100
