"""What is known of a study before it runs: how many jobs, and what they come to in its space."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from kvlab import KvlabError
from kvlab.platform.graph import Cell
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.kind import Parent, Prediction
from kvlab.platform.search.described import corners, space_of
from kvlab.platform.search.space import Space
from kvlab.platform.search.trials import Trials, fresh_seeds, ordered

Range = tuple[float, float]
"""The least and the most."""


@dataclass(frozen=True, slots=True)
class StudyCost:
    """Ranges are over the corners of the space: the ends of every range, and every choice.

    Attributes:
        trials, seeds: how many, and of each trial. again: seeds that confirm the winner.
        kinds: of the jobs of a trial and seed.
        flops: of all its jobs; one that all trials have in common counts once.
        parameters, kv_bytes_per_token: of a trial's model. None: unknown.
    """

    trials: int
    seeds: int
    again: int
    kinds: tuple[str, ...]
    flops: Range | None
    parameters: Range | None
    kv_bytes_per_token: Range | None

    def __str__(self) -> str:
        again = f" + {self.again} again" if self.again else ""
        return f"{self.trials} x ({', '.join(self.kinds)}){again}"


def cost_of(cell: Cell, outside: Mapping[str, Parent]) -> StudyCost:
    """Return what a `search` cell will cost. Args: outside: all cells before it, by name."""
    spec = cell.spec
    trials = Trials(cell.name, spec, outside)
    found: list[Mapping[str, Parent]] = []
    for values in corners(Space(space_of(spec))):
        with suppress(KvlabError):  # there can be no such trial
            found.append(trials.jobs(values))
    costs = [
        {kind: KINDS[kind].predict(job.spec, job.parents) for kind, job in trial.items()}
        for trial in found
    ]
    varied = {kind for trial in found for kind, job in trial.items() if job != found[0][kind]}
    seeds, again = len(spec["arms"]), fresh_seeds(spec)
    return StudyCost(
        spec["trials"],
        seeds,
        again,
        tuple(ordered(spec["trial"])),
        _range(_flops(trial, varied, spec["trials"], seeds, again) for trial in costs),
        _range(_last([one.parameters for one in trial.values()]) for trial in costs),
        _range(_last([one.kv_bytes_per_token for one in trial.values()]) for trial in costs),
    )


def _flops(
    trial: Mapping[str, Prediction], varied: Container[str], trials: int, seeds: int, again: int
) -> float | None:
    """What all trials would come to, were they like this one."""
    known = {kind: one.flops for kind, one in trial.items() if one.flops is not None}
    total = sum(flops * (trials if kind in varied else 1) for kind, flops in known.items())
    return total * seeds + again * sum(known.values()) if known else None


def _last(values: Iterable[float | None]) -> float | None:
    """Of a trial's jobs the last says what its model holds."""
    known = [value for value in values if value is not None]
    return known[-1] if known else None


def _range(values: Iterable[float | None]) -> Range | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None
