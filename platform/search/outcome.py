"""What a trial's jobs measured: one number for each metric, over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kvlab.platform.compare.metrics import METRICS
from kvlab.platform.compare.samples import READERS, Sample
from kvlab.platform.compare.statistics import summarise

TRAINING = {
    "body_parameters": "body_parameters",
    "parameters": "parameters",
    "train_seconds": "seconds",
    "train_flops": "flops",
}
"""Metric -> the key under which a training job's result has it."""


class Done(NamedTuple):
    """A finished job of a trial."""

    kind: str
    seed: int | None
    spec: Mapping[str, Any]
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of one trial: the mean over seeds, its 95 % interval (None for one seed without
    repeats), each seed's value, and why it does not count, if it does not.
    """

    value: float
    low: float | None
    high: float | None
    seeds: Mapping[str, float]
    void: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(jobs: Sequence[Done], names: Iterable[str]) -> dict[str, Measured]:
    """Return what jobs report of metrics; those that none reports are left out.

    Args: names: of `METRICS`; or KIND.KEY, any number in the result of a job of that kind.

    Of several batch sizes the largest counts, of several rates of a load the highest.
    """
    found = {}
    for name in names:
        samples = {job.seed: sample for job in jobs if (sample := _sample(job, name)) is not None}
        if samples:
            found[name] = _over(samples)
    return found


def excess(limit: Mapping[str, Any], values: Mapping[str, float], baseline: float | None) -> float:
    """How far a trial is beyond a constraint; 0 or less meets it.

    Args: limit: see `Search.resolve`. values: by metric.
    """
    bound = limit["number"] * (baseline if limit["of_baseline"] else 1.0)
    beyond = values[limit["metric"]] - bound
    return float(beyond if limit["sign"] == "<=" else -beyond)


def limit_text(limit: Mapping[str, Any]) -> str:
    """A constraint in words."""
    of = " * baseline" if limit["of_baseline"] else ""
    return f"{limit['metric']} {limit['sign']} {limit['number']:g}{of}"


def _at(result: Any, path: Sequence[str]) -> Sample | None:
    """The number at a path of a result; None: there is none."""
    for key in path:
        result = result.get(key) if isinstance(result, Mapping) else None
    number = isinstance(result, int | float) and not isinstance(result, bool)
    return Sample(float(result)) if number else None


def _over(samples: Mapping[int | None, Sample]) -> Measured:
    standing = {seed: sample for seed, sample in samples.items() if sample.void is None} or samples
    summary = summarise([sample.value for sample in standing.values()])
    low, high = summary.low, summary.high
    if summary.n == 1:
        (only,) = standing.values()
        low, high = only.low, only.high
    reasons = sorted({sample.void for sample in standing.values() if sample.void})
    return Measured(
        summary.mean,
        low,
        high,
        {str(seed): sample.value for seed, sample in standing.items()},
        "; ".join(reasons) or None,
    )


def _sample(job: Done, name: str) -> Sample | None:
    kind, _, path = name.partition(".")
    if path:
        return _at(job.result, path.split(".")) if kind == job.kind else None
    if METRICS[name].place == "training":
        value = job.result.get(TRAINING[name]) if "flops" in job.result else None
        return None if value is None else Sample(float(value))
    reader = READERS.get(job.kind)
    if reader is None:
        return None
    best: tuple[tuple[int, int], Sample] | None = None
    for number, reading in enumerate(reader(job.spec, job.result)):
        for key, sample in reading.samples.items():
            order = (number, key.batch or 0)
            if key.metric == name and (best is None or order >= best[0]):
                best = order, sample
    return None if best is None else best[1]
