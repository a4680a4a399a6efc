"""What a study searches: dimensions, some of which exist only under choices of others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvlab import KvlabError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Kind = Literal["float", "int", "categorical"]
Values = dict[str, Any]
"""The value of every dimension that a point has, by path."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that varies.

    Attributes:
        path: where its value goes, such as `squeeze_attention.p`.
        low, high: both ends included; numbers alone.
        step: distance of neighbouring values, counted from `low`; None: 1 for integers, and no
            steps for floats.
        log: equal ratios are equally likely. An integer with both is a multiple of `step`.
        choices: JSON-like values of a categorical dimension, mappings included.
        when: (path of a categorical dimension, indices of its choices under which this one exists);
            None: always.
    """

    path: str
    kind: Kind
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: tuple[str, frozenset[int]] | None = None

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise KvlabError(f"{self.path}: {problem}")

    def _problem(self) -> str:
        if self.kind == "categorical":
            try:
                known = [_text(choice) for choice in self.choices]
            except TypeError:
                return f"choices must be what JSON can say, found {list(self.choices)}"
            twice = sorted({text for text in known if known.count(text) > 1})
            if not known:
                return "needs at least one choice, found none"
            return f"each choice may stand once, found {', '.join(twice)} again" if twice else ""
        ends = f"{self.low:g} to {self.high:g}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"both ends of a range must be finite, found {ends}"
        if self.low > self.high:
            return f"a range goes from low to high, found {ends}"
        if self.log and self.low <= 0:
            return f"a log range must start above 0, found {ends}"
        if self.step is None:
            return ""
        if self.step <= 0:
            return f"step must be above 0, found {self.step:g}"
        if self.log and self.kind == "float":
            return "a float has a step or a log scale, not both: leave one out"
        if self.log and not (whole(self.low / self.step) and whole(self.high / self.step)):
            return f"with log, both ends must be multiples of step {self.step:g}, found {ends}"
        if not whole((self.high - self.low) / self.step):
            return f"{ends} is not a whole number of steps of {self.step:g}: move an end"
        return ""

    @property
    def count(self) -> int | None:
        """How many values it has; None: a continuum."""
        if self.kind == "categorical":
            return len(self.choices)
        if self.low == self.high:
            return 1
        step = self._step()
        return None if step is None else round((self.high - self.low) / step) + 1

    def values(self) -> Iterator[Any]:
        """Yield every value, from low to high or in the order written.

        Raises:
            KvlabError: a continuum.
        """
        if self.kind == "categorical":
            yield from self.choices
            return
        if self.count is None:
            raise KvlabError(f"{self.path}: a float without a step has no grid: give a step")
        for number in range(self.count):
            yield self._numbered(number)

    def admit(self, value: Any) -> Any:
        """Return the value as this dimension writes it: 1 as 1.0, 0.30000000000000004 as 0.3.

        Raises:
            KvlabError: it is not one of the dimension's.
        """
        if self.kind == "categorical":
            return self.choices[self.index(value)]
        allowed = f"{self.kind} from {self.low:g} to {self.high:g}"
        step = self._step()
        if step is not None:
            allowed += f" in steps of {step:g}"
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not self.low <= value <= self.high:
            raise KvlabError(f"{self.path}: must be {allowed}, found {value!r}")
        if step is None:
            return float(value)
        steps = (value - self.low) / step
        if not whole(steps):
            raise KvlabError(f"{self.path}: must be {allowed}, found {value!r}")
        return self._numbered(round(steps))

    def index(self, value: Any) -> int:
        """Return which choice a value is; raise a KvlabError if it is none."""
        known = [_text(choice) for choice in self.choices]
        if _text(value) not in known:
            raise KvlabError(f"{self.path}: must be one of {', '.join(known)}, found {value!r}")
        return known.index(_text(value))

    # Optuna's side: a distribution of this name, whose values are written as it can store them.

    @property
    def name(self) -> str:
        """What Optuna calls it: with log and step it knows the multiple, not the value."""
        return f"{self.path}/{self.step:g}" if self._scaled else self.path

    def distribution(self) -> BaseDistribution:
        """Return what Optuna samples it from."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "categorical":
            return CategoricalDistribution(self._labels())
        if self.kind == "float":
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)
        unit = int(self.step or 1) if self._scaled else 1
        step = 1 if self._scaled or self.step is None else int(self.step)
        return IntDistribution(int(self.low) // unit, int(self.high) // unit, self.log, step)

    def encode(self, value: Any) -> Any:
        """Write a value as Optuna stores it."""
        if self.kind == "categorical":
            return self._labels()[self.index(value)]
        return round(value / (self.step or 1)) if self._scaled else self.admit(value)

    def suggest(self, trial: Trial) -> Any:
        """Ask a trial for a value."""
        if self.kind == "categorical":
            labels = self._labels()
            return self.choices[labels.index(trial.suggest_categorical(self.name, labels))]
        if self.kind == "float":
            return self.admit(
                trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
            )
        scale: Any = self.distribution()
        found = trial.suggest_int(self.name, scale.low, scale.high, step=scale.step, log=self.log)
        return self.admit(found * int(self.step or 1) if self._scaled else found)

    @property
    def _scaled(self) -> bool:
        return self.log and self.step not in (None, 1)

    def _step(self) -> float | None:
        return 1 if self.step is None and self.kind == "int" else self.step

    def _numbered(self, number: int) -> int | float:
        value = self.low + number * (self._step() or 0)
        # 12 digits: 0.1 + 2 * 0.1 is the 0.3 that a person writes.
        return int(value) if self.kind == "int" else float(f"{value:.12g}")

    def _labels(self) -> list[Any]:
        """Choices as they stand where Optuna can store and tell them apart, else their JSON."""
        plain = all(isinstance(choice, str | int | float | bool | None) for choice in self.choices)
        if plain and len(set(self.choices)) == len(self.choices):
            return list(self.choices)
        return [_text(choice) for choice in self.choices]


class Space:
    """Dimensions in the order in which they are asked for.

    Args:
        dimensions: one that exists under choices of another stands behind it.
        feasible: the values of a point -> why it cannot be, or None where it can.

    Raises:
        KvlabError: a path that stands twice, or a condition on what is not there.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        feasible: Callable[[Values], str | None] | None = None,
    ) -> None:
        self.dimensions = tuple(dimensions)
        self._feasible = feasible
        before: dict[str, Dimension] = {}
        for dimension in self.dimensions:
            if dimension.path in before:
                raise KvlabError(f"{dimension.path}: stands twice in the space: leave one out")
            if dimension.when is not None:
                path, indices = dimension.when
                on = before.get(path)
                if on is None or on.kind != "categorical":
                    raise KvlabError(
                        f"{dimension.path}: depends on '{path}', which is no categorical dimension "
                        "before it"
                    )
                if not indices or not indices <= set(range(len(on.choices))):
                    raise KvlabError(
                        f"{dimension.path}: '{path}' has choices 0 to {len(on.choices) - 1}, found "
                        f"{sorted(indices)}"
                    )
            before[dimension.path] = dimension

    @property
    def conditional(self) -> bool:
        """Whether some points lack a dimension that others have."""
        return any(dimension.when is not None for dimension in self.dimensions)

    def feasible(self, values: Values) -> str | None:
        """Say why a point cannot be; None: it can."""
        return None if self._feasible is None else self._feasible(values)

    def suggest(self, trial: Trial) -> Values:
        """Ask a trial for a value of every dimension that the values before it call for."""
        values: Values = {}
        for dimension in self.dimensions:
            if self._active(dimension, values):
                values[dimension.path] = dimension.suggest(trial)
        return values

    def admit(self, values: Mapping[str, Any], *, partial: bool = False) -> Values:
        """Return a point as the space writes it: its own dimensions alone, in order.

        Values of dimensions that do not exist beside the others are left out.

        Args: partial: values may lack.

        Raises:
            KvlabError: a path that the space does not have, a value that is missing or outside.
        """
        known = [dimension.path for dimension in self.dimensions]
        if unknown := [path for path in values if path not in known]:
            raise KvlabError(f"{unknown[0]}: is not in the space; it has: {', '.join(known)}")
        point: Values = {}
        for dimension in self.dimensions:
            if self._active(dimension, point):
                if dimension.path in values:
                    point[dimension.path] = dimension.admit(values[dimension.path])
                elif not partial:
                    raise KvlabError(f"{dimension.path}: has no value in the point {dict(values)}")
        return point

    def key(self, values: Mapping[str, Any]) -> str:
        """Return what two descriptions of one point have in common, as JSON; see `admit`."""
        return _text(self.admit(values))

    def encode(
        self, values: Values, *, partial: bool = False
    ) -> tuple[Values, dict[str, BaseDistribution]]:
        """Return a point as Optuna stores it: values and distributions by Optuna's names."""
        point = self.admit(values, partial=partial)
        active = [dimension for dimension in self.dimensions if dimension.path in point]
        stored = {dimension.name: dimension.encode(point[dimension.path]) for dimension in active}
        return stored, {dimension.name: dimension.distribution() for dimension in active}

    def count(self) -> int | None:
        """How many points there are, infeasible ones included; None: a continuum."""
        asked = {dimension.when[0] for dimension in self.dimensions if dimension.when is not None}

        def below(number: int, chosen: Values) -> int | None:
            if number == len(self.dimensions):
                return 1
            dimension = self.dimensions[number]
            if not self._active(dimension, chosen):
                return below(number + 1, chosen)
            if dimension.path not in asked:
                rest = below(number + 1, chosen)
                return None if dimension.count is None or rest is None else dimension.count * rest
            found = [below(number + 1, {**chosen, dimension.path: c}) for c in dimension.choices]
            return None if None in found else sum(each for each in found if each)

        return below(0, {})

    def points(self) -> Iterator[Values]:
        """Yield every point, infeasible ones included.

        Raises:
            KvlabError: a float without a step.
        """

        def below(number: int, chosen: Values) -> Iterator[Values]:
            if number == len(self.dimensions):
                yield chosen
            elif not self._active(dimension := self.dimensions[number], chosen):
                yield from below(number + 1, chosen)
            else:
                for value in dimension.values():
                    yield from below(number + 1, {**chosen, dimension.path: value})

        return below(0, {})

    def _active(self, dimension: Dimension, values: Values) -> bool:
        if dimension.when is None:
            return True
        path, indices = dimension.when
        on = next(other for other in self.dimensions if other.path == path)
        return path in values and on.index(values[path]) in indices


def whole(number: float) -> bool:
    """Whether a number of steps is one, but for what floats lose."""
    return abs(number - round(number)) < 1e-6


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
