"""What is known of every point of a study: all that outlives a controller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvlab import KvlabError

TRIAL = "trial"
"""The kind of the events that say how a trial stands."""
Direction = Literal["minimize", "maximize"]
State = Literal["running", "complete", "failed", "pruned"]
Source = Literal["sampler", "enqueued", "repeat"]


@dataclass(frozen=True, slots=True)
class Point:
    """A trial to be run: its number in the study, and the value of each dimension by path."""

    number: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A trial as it stands.

    Attributes:
        state: `running` from the moment it is handed out.
        objectives: by name, of a complete trial; else empty.
        constraints: by name, of a complete trial; 0 or less is feasible.
        source: who proposed it; a `repeat` was answered from another trial and never run.
        same_as: the number of that trial.
    """

    number: int
    values: Mapping[str, Any]
    state: State = "running"
    objectives: Mapping[str, float] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    source: Source = "sampler"
    same_as: int | None = None

    @property
    def feasible(self) -> bool:
        """Whether it is complete and meets every constraint."""
        return self.state == "complete" and all(v <= 0 for v in self.constraints.values())


def accepted(
    objectives: Mapping[str, float] | None,
    constraints: Mapping[str, float] | None,
    wanted: Sequence[str],
    held: Sequence[str],
) -> tuple[dict[str, float], dict[str, float]] | None:
    """Return what a complete trial reported, as floats; None where a number is NaN or infinite.

    Args:
        wanted: names of the objectives. held: names of the constraints.

    Raises:
        KvlabError: an objective or a constraint that was not reported.
    """
    found: list[dict[str, float]] = []
    for kind, names, told in (
        ("objective", wanted, objectives or {}),
        ("constraint", held, constraints or {}),
    ):
        if lacking := [name for name in names if name not in told]:
            raise KvlabError(
                f"{kind} '{lacking[0]}': was not reported; found: {', '.join(told) or 'none'}"
            )
        found.append({name: float(told[name]) for name in names})
    if not all(math.isfinite(number) for numbers in found for number in numbers.values()):
        return None
    return found[0], found[1]


def losses(values: Mapping[str, float], objectives: Mapping[str, Direction]) -> tuple[float, ...]:
    """Return the objectives, in order, turned so that less is better."""
    return tuple(
        values[name] if direction == "minimize" else -values[name]
        for name, direction in objectives.items()
    )
