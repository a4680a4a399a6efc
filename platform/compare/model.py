"""The one object that the table, the JSON and report.html are three views of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from kvlab.platform.compare.calibrations import Calibration
from kvlab.platform.compare.controllers import Guess
from kvlab.platform.compare.metrics import METRICS, Metric, Place
from kvlab.platform.compare.samples import Recalled

if TYPE_CHECKING:
    from kvlab.platform.compare.studies import Study

Verdict = Literal["better", "worse", "equal", "not distinguished", "no interval"]
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Change:
    """An arm's number against its baseline's.

    Attributes:
        ratio: over the baseline's; None where `difference` is what is compared.
        low, high: 95 % interval of the ratio or the difference. verdict: what may be said.
    """

    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    basis: str
    difference: float | None = None


@dataclass(frozen=True, slots=True)
class Number:
    """One number of one arm, over its seeds.

    Attributes:
        value: mean over the seeds that have it and are not void; None when there is none.
        missing: why there is no value, or why some seed of it was left out.
        seeds: the value of each seed. expected: how many seeds were to give one.
        sd: sample standard deviation over seeds (None for one seed).
        low, high: 95 % interval of the mean; with one seed the interval of its repeats, if any.
        void: why the number does not count (a gate was closed), else None; the value still stands.
        change: against the baseline; None without one, when void, or for the baseline itself.
        unpaired: whose seeds the mean is over, where they are not the baseline's; else None.
    """

    value: float | None
    seeds: Mapping[str, float] = field(default_factory=dict)
    expected: int = 0
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    void: str | None = None
    missing: str | None = None
    change: Change | None = None
    unpaired: str | None = None

    @property
    def stands(self) -> bool:
        """Whether the number may be compared at all."""
        return self.value is not None and self.void is None


@dataclass(frozen=True, slots=True)
class Setting:
    """What numbers must share to stand in one column: scored targets, or load and device."""

    id: str
    place: Place
    title: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One kind of number in one setting (and, for a benchmark, at one batch size)."""

    id: str
    metric: str
    setting: str | None
    batch: int | None
    headline: bool

    @property
    def kind(self) -> Metric:
        return METRICS[self.metric]


@dataclass(frozen=True, slots=True)
class Cost:
    """What making an arm's model took, means over seeds: its own job, and the jobs before it."""

    seconds: float
    flops: float
    inherited_seconds: float
    inherited_flops: float
    checkpoint: bool


@dataclass(frozen=True, slots=True)
class Arm:
    """One method under comparison: a model's job at one point of its matrix, and how it is used.

    Attributes:
        id: unique in the comparison. job: the YAML key of the job that made the model.
        axes: matrix values, seeds left out.
        method, apply: train-time and run-time choices in words.
        against: id of the arm it is compared with, None for the baseline or without one.
        states: how many of its jobs (model and measurements) are in which state.
        problems: what did not finish, and why.
        loss_by_position: setting id -> mean loss at each position of a window (None: not scored).
        kl_by_position: setting id -> mean divergence at each position after the prompt.
        cells: setting id -> accuracy by task, length and depth.
    """

    id: str
    job: str
    axes: Mapping[str, Any]
    method: str
    apply: str
    baseline: bool
    against: str | None
    states: Mapping[str, int]
    problems: tuple[str, ...]
    numbers: Mapping[str, Number]
    cost: Cost | None
    loss_by_position: Mapping[str, tuple[float | None, ...]]
    models: tuple[int, ...]
    kl_by_position: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    cells: Mapping[str, tuple[Recalled, ...]] = field(default_factory=dict)

    def number(self, column: str) -> Number:
        return self.numbers.get(column, Number(None, missing="not measured"))


@dataclass(frozen=True, slots=True)
class Front:
    """Which arms nothing beats.

    `dominated`: arm -> who beats it. `excluded`: arm -> why it takes no part.
    """

    columns: tuple[str, ...]
    members: tuple[str, ...]
    dominated: Mapping[str, tuple[str, ...]]
    excluded: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A workflow's results, ready to be shown.

    Attributes:
        columns: in the order of tables; those marked `headline` make the main one.
        notes: what a reader must know before believing a number.
        measured: whether some arm has a number; where jobs measure, one that was measured.
        calibrations: what its calibrate jobs found. guesses: what its controller jobs found.
        studies: what its search jobs found. unfound: search jobs that are not done, or failed.
        environments: device descriptions seen in benchmarks, each with the settings it belongs to.
    """

    workflow_id: int
    name: str
    state: str
    created_at: float
    text: str
    baseline: str | None
    arms: tuple[Arm, ...]
    settings: tuple[Setting, ...]
    columns: tuple[Column, ...]
    front: Front | None
    notes: tuple[str, ...]
    environments: tuple[Mapping[str, Any], ...]
    jobs: Mapping[str, int]
    measured: bool
    calibrations: tuple[Calibration, ...] = ()
    guesses: tuple[Guess, ...] = ()
    studies: tuple[Study, ...] = ()
    unfound: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.id == name)

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.id == name), None)

    def headline(self, metric: str) -> Column | None:
        """The column of `metric` that the main table shows."""
        return next((c for c in self.columns if c.metric == metric and c.headline), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: no NaN or Infinity (null instead), stable keys, a schema number."""
        raw = asdict(self)
        raw.pop("text")
        return {"schema": SCHEMA, **_finite(raw)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
