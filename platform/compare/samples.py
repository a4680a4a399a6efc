"""From result rows to samples: which number, of which arm, in which setting, for which seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from kvlab.platform.compare.statistics import bootstrapped


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
        windows, weights: its mean loss (or itself, where it is compared by differences) in each
            window of text or question, and the targets scored there; how much the metric's
            logarithm moves per unit of loss is `slope`.
        void: why it does not count.
    """

    value: float
    low: float | None = None
    high: float | None = None
    windows: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    slope: float = 1.0
    void: str | None = None


@dataclass(frozen=True, slots=True)
class Recalled:
    """Accuracy in one cell: task, tokens of the prompt, depth of what is asked for (0 to 1).

    void: why it does not count.
    """

    task: str
    length: int
    depth: float
    accuracy: float
    full_accuracy: float
    void: str | None


@dataclass(slots=True)
class Reading:
    """What one measuring job's result holds in one setting.

    Attributes:
        by_position: mean loss at each position of a window; or mean divergence at each position
            after the prompt. None where nothing was scored.
        cells: of a recall.
    """

    place: Place
    setting: tuple[Any, ...]
    details: dict[str, Any]
    samples: dict[Key, Sample] = field(default_factory=dict)
    by_position: tuple[float | None, ...] | None = None
    cells: tuple[Recalled, ...] = ()


def read_evaluation(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Reading]:
    """Read an evaluation: whatever of held-out text, divergence and recall it measured."""
    if "targets" in result:
        yield read_quality(spec, result)
    if "divergence" in result:
        yield read_divergence(result)
    if "recall" in result:
        yield read_recall(result, "recall", "recall")
    if "multi_turn" in result:
        yield read_recall(result, "multi_turn", "recall_after_cut")


def read_quality(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Reading:
    """Read scored text. Its setting is the very targets that were scored: their hash and window."""
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
        reading.by_position = tuple(_number(value) for value in by_position)
    return reading


def read_divergence(result: Mapping[str, Any]) -> Reading:
    """Read a comparison with the full cache. Its setting is the very prompts, by their hash."""
    found = result["divergence"]
    prompts, windows = found["prompts"], found["windows"]
    setting = ("divergence", prompts["hash"])
    reading = Reading("divergence", setting, dict(prompts))
    void = _void(_closed_gates(result), timed=False)
    targets = windows["targets"]
    for name, each, weights in (
        ("kl", windows["kl"], targets),
        ("top1_agreement", windows["top1_agreement"], targets),
        ("identical_tokens", windows["identical_tokens"], [1] * len(targets)),
    ):
        reading.samples[Key(name, setting, None)] = _each(found[name], each, weights, void)
    if (value := _number(found["perplexity"])) is not None:
        losses, weights = tuple(windows["losses"]), tuple(map(float, targets))
        reading.samples[Key("continuation_perplexity", setting, None)] = Sample(
            value, windows=losses, weights=weights, void=void
        )
    reading.by_position = tuple(_number(value) for value in found["by_position"]["kl"])
    return reading


def read_recall(result: Mapping[str, Any], place: Place, metric: str) -> Reading:
    """Read answers to questions. Their setting is the very questions that stand, by their hash."""
    found = result[place]
    setting = (place, found["prompts"]["hash"])
    cells = tuple(Recalled(**cell) for cell in found["cells"])
    voids = sum(cell.void is not None for cell in cells)
    details = {**found["prompts"], "cells": len(cells), "void_cells": voids}
    reading = Reading(place, setting, details, cells=cells)
    void = _void(_closed_gates(result), timed=False)
    key = Key(metric, setting, None)
    if found["accuracy"] is not None:
        answers = found["answers"]
        reading.samples[key] = _each(found["accuracy"], answers, [1] * len(answers), void)
    elif cells:
        mean = sum(cell.accuracy for cell in cells) / len(cells)
        reading.samples[key] = Sample(mean, void=f"in every cell {cells[0].void}"[:200])
    return reading


def _each(
    value: float, each: Sequence[float], weights: Sequence[float], void: str | None
) -> Sample:
    """A number that is the weighted mean of its values in windows, with its interval over them."""
    found = bootstrapped(each, weights)
    return Sample(
        value,
        low=found.low,
        high=found.high,
        windows=tuple(map(float, each)),
        weights=tuple(map(float, weights)),
        void=void,
    )


def read_speed(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Reading]:
    """Read a benchmark. Its setting is the load and the device: other machines, other columns."""
    if result.get("engine"):
        yield read_served(spec, result)
        return
    details = _circumstances(spec, result)
    details["kv_budget"] = spec.get("kv_budget")
    details["cuda_graph"] = spec.get("cuda_graph", True)
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
    yield reading


def read_served(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Reading:
    """Read a benchmark through vLLM. Its setting is the load, the pool and the device."""
    details = _circumstances(spec, result)
    details["pool"] = result["engine"]["asked_pool_bytes"]
    details["requests"] = result["engine"]["max_num_seqs"]
    details["vllm"] = result["engine"]["vllm"]
    setting = ("serving", *details.values())
    reading = Reading("serving", setting, details)
    closed = _closed_gates(result)
    for row in result["rows"]:
        for metric in METRICS.values():
            raw = row.get(metric.key.removeprefix("served_"))
            if metric.place == "serving" and (
                sample := _measured(raw, _void(closed, metric.timed))
            ):
                reading.samples[Key(metric.key, setting, row["batch"])] = sample
    return reading


LOADS = {
    "load_tokens_per_second": ("tokens_per_second",),
    "load_goodput": ("goodput",),
    "load_first_token_p50": ("time_to_first_token", "p50"),
    "load_first_token_p99": ("time_to_first_token", "p99"),
    "load_inter_token_p50": ("inter_token", "p50"),
    "load_inter_token_p99": ("inter_token", "p99"),
    "load_peak_usage": ("peak_usage",),
    "load_preemptions": ("preemptions",),
}
"""Metric -> where a rate's figures hold it."""


def read_load(spec: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Reading]:
    """Read a server under load: each rate is a setting."""
    closed = _closed_gates(result)
    for figures in result.get("rates") or ():
        details = _circumstances(spec, result)
        details["rate"] = figures["rate"]
        for name in ("requests", "turns", "shared_prefix", "memory", "concurrency"):
            details[name] = spec.get(name)
        text = {name: str(value) for name, value in details.items()}
        setting = ("load", *text.values(), str(spec.get("slo")))
        reading = Reading("load", setting, details)
        for key, path in LOADS.items():
            raw: Any = figures
            for name in path:
                raw = raw[name]
            sample = Sample(float(raw), void=_void(closed, METRICS[key].timed))
            reading.samples[Key(key, setting, None)] = sample
        yield reading


READERS = {"evaluate": read_evaluation, "benchmark": read_speed, "serve_benchmark": read_load}
"""Kinds of measuring job that a comparison can read."""


def _circumstances(spec: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The load of a benchmark and where it ran."""
    environment = result.get("environment") or {}
    details: dict[str, Any] = {"prompt": spec.get("prompt"), "generate": spec.get("generate")}
    for name in ("device", "device_name", "threads", "dtype"):
        details[name] = environment.get(name)
    details["dtype"] = details["dtype"] or spec.get("dtype")
    return details


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
