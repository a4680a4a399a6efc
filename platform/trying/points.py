"""The points that are tried: values of the run-time axes, at budgets, as a YAML writes them.

Nothing here names a method: what there is, what it reads and what it needs is the registry's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvlab import KvlabError
from kvlab.methods.axis import AxisName, Value
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.registry import REGISTRY, resolve
from kvlab.platform.jobs.cost import ITEMSIZES
from kvlab.platform.jobs.flops import cost_under
from kvlab.platform.jobs.method import compatible, short_of
from kvlab.platform.trying.subject import Subject

CACHE_AXES: tuple[AxisName, ...] = ("eviction", "budget", "precision")
"""The axes that decide what a cache holds. How a prompt is read does not: `prefill` is left out."""
SHARE = "share"
"""The parameter of a budget value that says how much of a prompt stays."""
FEWEST_ROWS = 5
"""Rows of the smallest budget that means anything: four sinks and one more."""

Written = Mapping[str, Mapping[str, Any]]
Stage = Literal["single", "composed"]


@dataclass(frozen=True, slots=True)
class Point:
    """One way of using the model.

    Attributes:
        written: as `apply:` has it; {} is the full cache.
        budget: the share it was made for; None: it stands at its own size whatever the budget.
        stage: values of one axis (with the uniform budget), or compositions of several.
    """

    written: Written
    budget: float | None
    stage: Stage = "single"

    @property
    def key(self) -> str:
        """Equal for equal ways of using the model, also where defaults are written out."""
        return key_of(resolve(self.written).to_dict())

    @property
    def label(self) -> str:
        """`h2o + squeeze_attention`: what it is made of, without its budget."""
        return " + ".join(_named(name, params) for name, params in self._telling()) or "full cache"

    @property
    def eviction(self) -> str | None:
        """The value of the eviction axis, where it has one."""
        return self._value("eviction")

    def _value(self, axis: AxisName) -> str | None:
        return next((name for name in self.written if value_of(name).axis == axis), None)

    def _telling(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, params in self.written.items():
            told = {key: value for key, value in params.items() if key != SHARE}
            if not value_of(name).default or told:
                yield name, told


def key_of(canonical: Mapping[str, Any]) -> str:
    """Return the key of a method's canonical form."""
    return json.dumps(canonical, sort_keys=True)


def value_of(name: str) -> Value:
    """Return the axis value of that name."""
    entry = REGISTRY.find(name)
    assert isinstance(entry, Value)
    return entry


def _named(name: str, params: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{key} {value}" for key, value in params.items())
    return f"{name} ({inside})" if inside else name


class Candidates:
    """What fits a model at budgets of prompts of one length.

    Args:
        prompt: tokens of a prompt. length: of a whole sequence.
        budgets: shares of it, above 0, at most 1.
        itemsize: bytes of a cached number.
        only: names of values that may be used; None: all.

    """

    def __init__(
        self,
        subject: Subject,
        prompt: int,
        length: int,
        budgets: Sequence[float],
        itemsize: int,
        only: Sequence[str] | None = None,
    ) -> None:
        self._subject, self._itemsize = subject, itemsize
        self._prompt, self._length, self._budgets = prompt, length, budgets
        self._only = only
        self._left_out: dict[tuple[str, str], list[float | None]] = {}
        self.evictions = self._values("eviction")
        self.budgets = [value for value in self._values("budget") if _sized(value)]
        self.precisions = self._values("precision")

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was asked for and does not fit, and why: one line each."""
        lines = []
        for (label, problem), budgets in self._left_out.items():
            shares = [percent(share) for share in dict.fromkeys(budgets) if share is not None]
            at = f" at {', '.join(shares)}" if shares else ""
            lines.append(f"{label}{at}: {problem}")
        return tuple(lines)

    def singles(self) -> list[Point]:
        """Every eviction with the uniform budget, at every budget; every precision by itself."""
        found: list[Point] = []
        for value in self.evictions:
            if "budget" not in value.consumes:
                found += self._fitting([Point({value.name: {}}, None)])
                continue
            found += self._fitting(Point(self._sized(value.name, b), b) for b in self._budgets)
        found += self._fitting(Point({value.name: {}}, None) for value in self.precisions)
        return found

    def composed(self, best: Mapping[float, Sequence[str]]) -> list[Point]:
        """Budget values and precisions over the evictions that were best at each budget.

        With a precision the eviction keeps as many more rows as its smaller ones make room for, so
        that the point takes the bytes of the eviction alone. Where there is no such number of rows
        (all of them fit, or not even as many as the eviction needs) there is no such point.
        """
        found: list[Point] = []
        for budget, evictions in best.items():
            for name in evictions:
                made = [
                    Point({name: {}, value.name: {SHARE: budget}}, budget, "composed")
                    for value in self.budgets
                ]
                for value in self.precisions:
                    if (point := self._equal(name, value.name, budget)) is not None:
                        made.append(point)
                found += self._fitting(made)
        return found

    def _equal(self, eviction: str, precision: str, budget: float) -> Point | None:
        """An eviction with a precision, at as many rows as take the bytes of the eviction alone."""
        most = self._prompt // self._subject.span
        room = self.bytes(self._sized(eviction, budget))

        def point(rows: int) -> Point:
            share = min(1.0, round((rows + 0.5) / most, 6))
            return Point({**self._sized(eviction, share), precision: {}}, budget, "composed")

        least = max(FEWEST_ROWS, self._least(eviction))
        if least > most or self.bytes(point(least).written) > room:
            return None
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.bytes(point(middle).written) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return point(low) if low < most else None

    def _least(self, eviction: str) -> int:
        return least_rows(resolve({eviction: {}}))

    def bytes(self, written: Written) -> float:
        """Bytes of a sequence at its end, as the cost model says."""
        apply = resolve(written).to_dict()
        cost = cost_under(self._subject.config, self._subject.trained, apply)
        return float(cost.kv_bytes(self._length, self._itemsize, self._prompt))

    def _sized(self, eviction: str, share: float) -> dict[str, dict[str, Any]]:
        """An eviction at a share under the default budget value."""
        default = next(value for value in REGISTRY.values("budget") if value.default)
        return {eviction: {}, default.name: {SHARE: share}}

    def _values(self, axis: AxisName) -> list[Value]:
        """The values of an axis that change something, and may be used."""
        found = [value for value in REGISTRY.values(axis) if not value.default]
        return [value for value in found if self._only is None or value.name in self._only]

    def _fitting(self, points: Iterable[Point]) -> list[Point]:
        found = []
        for point in points:
            problem = self._problem(point)
            if problem and point.stage == "single":
                self._left_out.setdefault((point.label, problem), []).append(point.budget)
            if not problem:
                found.append(point)
        return found

    def _problem(self, point: Point) -> str:
        """Why a point cannot be run on this model; empty where it can."""
        subject = self._subject
        try:
            method = resolve(point.written)
        except KvlabError as error:
            return str(error)
        if lacking := method.lacks():
            return f"needs a trained {lacking} (docs/adore.md): give it in a workflow"
        problems = compatible(method, subject.config, "apply", trained=subject.method)
        for _, problem in problems:
            return problem
        for _, problem in short_of(method, subject.method, self._prompt, "apply"):
            # Said once for all budgets where the number of rows is all there is to it.
            least = self._least(point.eviction) if point.eviction else 1
            rows = self._prompt // subject.span
            return f"keeps at least {least} of {rows} rows" if least > 1 else problem
        return ""


def _sized(value: Value) -> bool:
    """Whether a budget value is given as a share of the prompt."""
    return any(field.name == SHARE for field in fields(value.params))


def by_budget(points: Iterable[Point]) -> dict[float, list[Point]]:
    """The points that were made for a budget, by that."""
    found: dict[float, list[Point]] = {}
    for point in points:
        if point.budget is not None:
            found.setdefault(point.budget, []).append(point)
    return dict(sorted(found.items()))


def percent(share: float) -> str:
    """`12.5 %`."""
    return f"{100 * share:.4g} %"


def known_names() -> list[str]:
    """Values of the cache's axes that may be asked for by name."""
    found = [v for axis in CACHE_AXES for v in REGISTRY.values(axis) if not v.default]
    return sorted(v.name for v in found if v.axis != "budget" or _sized(v))


def itemsize_of(device: str) -> int:
    """Bytes of a cached number where the dtype is left to the device."""
    return ITEMSIZES["bfloat16" if device == "cuda" else "float32"]
