"""From result rows to samples: which number, of which arm, in which setting, for which seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvlab.platform.compare.metrics import (
    AT_BUDGET,
    METRICS,
    RATES,
    TIMING_GATES,
    Place,
    gate_reason,
)


class Key(NamedTuple):
    """What a sample measures: a metric, in a setting (None: the model itself), at a batch size."""

    metric: str
    setting: tuple[Any, ...] | None
    batch: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One seed's number.

    Attributes:
        low, high: 95 % interval of its repeats, where it was repeated.
        windows, weights: its mean loss in each window of text and the targets scored there; how
            much the metric's logarithm moves per unit of loss is `slope`.
        void: why it does not count.
    """

    value: float
    low: float | None = None
    high: float | None = None
    windows: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    slope: float = 1.0
    void: str | None = None


@dataclass(slots=True)
class Reading:
    """What one measuring job's result holds."""

    place: Place
    setting: tuple[Any, ...]
    details: dict[str, Any]
    samples: dict[Key, Sample] = field(default_factory=dict)
    loss_by_position: tuple[float | None, ...] | None = None


def read_quality(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Reading:
    """Read an evaluation. Its setting is the very targets it scored: their hash and window."""
    targets = result["targets"]
    length = spec.get("sequence_length")
    setting = ("quality", targets["hash"], length)
    details = {
        "targets": targets["count"],
        "targets_hash": targets["hash"],
        "first_target": targets["first_target"],
        "sequence_length": length,
    }
    reading = Reading("quality", setting, details)
    closed = _closed_gates(result)
    windows, weights = _windows(result)
    for name in ("perplexity", "perplexity_per_byte", "bits_per_byte", "loss"):
        value = _number(result.get(name))
        if value is None:
            continue
        sample = Sample(
            value,
            windows=windows,
            weights=weights,
            slope=_slope(name, value, _number(result.get("loss"))),
            void=_void(closed, timed=False),
        )
        reading.samples[Key(name, setting, None)] = sample
    if by_position := result.get("loss_by_position"):
        reading.loss_by_position = tuple(_number(value) for value in by_position)
    return reading


def read_speed(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Reading:
    """Read a benchmark. Its setting is the load and the device: other machines, other columns."""
    environment = result.get("environment") or {}
    details: dict[str, Any] = {"prompt": spec.get("prompt"), "generate": spec.get("generate")}
    for name in ("device", "device_name", "threads", "dtype"):
        details[name] = environment.get(name)
    details["dtype"] = details["dtype"] or spec.get("dtype")
    details["kv_budget"] = spec.get("kv_budget")
    setting = ("speed", *details.values())
    reading = Reading("speed", setting, details)
    closed = _closed_gates(result)
    largest = _number(result.get("largest_batch"))
    asked = spec.get("batch") or ()
    for row in result.get("rows") or ():
        found = {
            metric.key: sample
            for metric in METRICS.values()
            if metric.place == "speed"
            and (sample := _measured(row.get(metric.key), _void(closed, metric.timed)))
        }
        if largest and row["batch"] == largest:
            for rate in RATES.keys() & found.keys():
                reading.samples[Key(rate + AT_BUDGET, setting, None)] = found[rate]
        # The largest batch of a budget is each arm's own: no column of its own for it.
        if row["batch"] in asked or not asked:
            for name, sample in found.items():
                reading.samples[Key(name, setting, row["batch"])] = sample
    if largest is not None:
        void = _void(closed, timed=False)
        reading.samples[Key("largest_batch", setting, None)] = Sample(largest, void=void)
    return reading


READERS = {"evaluate": read_quality, "benchmark": read_speed}
"""Kinds of measuring job that a comparison can read."""


def _measured(raw: Any, void: str | None) -> Sample | None:
    """A plain number, or {median, low, high, ...}."""
    if isinstance(raw, Mapping):
        value = _number(raw.get("median"))
        low, high = _number(raw.get("low")), _number(raw.get("high"))
        return None if value is None else Sample(value, low, high, void=void)
    value = _number(raw)
    return None if value is None else Sample(value, void=void)


def _number(raw: Any) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        return None
    return float(raw)


def _windows(
    result: Mapping[str, Any],
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    losses = [_number(value) for value in result.get("window_losses") or ()]
    targets = [_number(value) for value in result.get("window_targets") or ()]
    if not losses or len(losses) != len(targets) or None in losses or None in targets:
        return None, None
    return tuple(v for v in losses if v is not None), tuple(v for v in targets if v is not None)


def _slope(name: str, value: float, loss: float | None) -> float:
    """d log(metric) / d loss, so that differences of window losses become ratios of the metric."""
    if name == "perplexity" or not loss:
        return 1.0
    if name == "perplexity_per_byte":
        return math.log(value) / loss if value > 0 else 1.0
    return 1.0 / loss


def _closed_gates(result: Mapping[str, Any]) -> list[str]:
    return [name for name, open_ in (result.get("gates") or {}).items() if open_ is False]


def _void(closed: Iterable[str], timed: bool) -> str | None:
    reasons = [gate_reason(name) for name in closed if timed or name not in TIMING_GATES]
    return "; ".join(reasons) or None
