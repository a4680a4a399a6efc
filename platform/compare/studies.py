"""What search jobs found: every trial of a study, its front, and how soon it got there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from kvlab.db.rows import JobRow
from kvlab.db.states import JobState
from kvlab.platform.compare.differences import change
from kvlab.platform.compare.labels import arm_name
from kvlab.platform.compare.metrics import metric_of
from kvlab.platform.compare.model import Number
from kvlab.platform.compare.samples import Sample
from kvlab.platform.compare.statistics import summarise
from kvlab.platform.search.outcome import limit_text
from kvlab.platform.search.quality import hypervolumes, normalised
from kvlab.platform.search.rows import Direction, losses

KIND = "search"
COMPLETE = "complete"
REFERENCE = 1.1
"""Where the box of a hypervolume ends, in normalised losses: a tenth beyond the worst seen, so that
the ends of a front count too."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a study and what came of it.

    Attributes:
        values: by path. numbers: by metric; `change` is against the study's baseline.
        beyond: constraint -> how far the trial is beyond it; 0 or less meets it.
        same_as: the trial that answered this one, which was never run; else None.
        message: why it failed. feasible: it is complete and meets every constraint.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    numbers: Mapping[str, Number]
    beyond: Mapping[str, float]
    same_as: int | None
    message: str | None
    feasible: bool

    @property
    def void(self) -> str | None:
        """Why some number of it does not count, if so."""
        return "; ".join(sorted({n.void for n in self.numbers.values() if n.void})) or None

    @property
    def missed(self) -> list[str]:
        """The constraints that it does not meet."""
        return [name for name, beyond in self.beyond.items() if beyond > 0]

    def value(self, metric: str) -> float:
        """A number of a complete trial."""
        value = self.numbers[metric].value
        assert value is not None
        return value


@dataclass(frozen=True, slots=True)
class Progress:
    """How a study stood after each trial that was run, by number.

    Attributes:
        best: objective -> the best value of a feasible trial so far; None: there was none yet.
        hypervolume: share of the box from the best values of the whole study to a tenth beyond its
            worst that the front dominates; empty where it is not known.
    """

    trials: tuple[int, ...]
    best: Mapping[str, tuple[float | None, ...]]
    hypervolume: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The winner measured again, on seeds that the study has not seen. message: why it was not."""

    seeds: tuple[int, ...]
    numbers: Mapping[str, Number]
    message: str | None


@dataclass(frozen=True, slots=True)
class Study:
    """One search job that is done.

    Attributes:
        id: its name. asked: trials that were to be run. seeds: measurements behind every number.
        objectives: directions by metric. constraints: in words. metrics: objectives first, then
            those under a constraint alone.
        space: path -> its dimension as it is stored.
        trials: by number, those answered without running included.
        baseline: the numbers of `against`, measured as a trial is; empty without one.
        best: number of the best feasible trial by the first objective. front: numbers.
        importances: objective -> share by path, largest first; None: not known.
        ended: why not all trials were run.
        pruned: training steps that trials did not make as they were stopped, "steps" out of "of";
            None: nothing was to be pruned.
        confirmed: the best trial again; None: that was not asked for.
        promoted: points of an earlier study that were tried first; None: there was none.
    """

    id: str
    sampler: str
    asked: int
    seeds: int
    objectives: Mapping[str, Direction]
    constraints: tuple[str, ...]
    metrics: tuple[str, ...]
    space: Mapping[str, Mapping[str, Any]]
    trials: tuple[Trial, ...]
    against: str | None
    baseline: Mapping[str, Number]
    best: int | None
    front: tuple[int, ...]
    importances: Mapping[str, Mapping[str, float]] | None
    ended: str | None
    progress: Progress
    pruned: Mapping[str, Any] | None = None
    confirmed: Confirmed | None = None
    promoted: int | None = None

    @property
    def run(self) -> list[Trial]:
        """The trials that were run."""
        return [trial for trial in self.trials if trial.same_as is None]

    @property
    def states(self) -> dict[str, int]:
        """How many trials that were run are in which state."""
        return dict(Counter(trial.state for trial in self.run))

    @property
    def feasible(self) -> list[Trial]:
        return [trial for trial in self.run if trial.feasible]

    def trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)

    def ranked(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials by the first objective, best first; those that meet more constraints before."""
        first = dict(list(self.objectives.items())[:1])
        return sorted(trials, key=lambda t: (len(t.missed), losses(_values(t, first), first)))


def of_trial(row: JobRow) -> bool:
    """Whether a job was made by a study for one of its trials. No job of a YAML has a slash."""
    return "/" in row.job


def read_studies(jobs: Sequence[JobRow]) -> tuple[Study, ...]:
    """Return what the finished search jobs of a workflow found, in its order."""
    by_name = {row.name: row for row in jobs}
    done = [r for r in jobs if r.kind == KIND and r.state is JobState.DONE and r.result]
    return tuple(_read(row, row.result or {}, by_name) for row in done)


def unfound(jobs: Sequence[JobRow]) -> tuple[str, ...]:
    """The search jobs that found nothing: they are not done, or failed."""
    return tuple(r.name for r in jobs if r.kind == KIND and r.state is not JobState.DONE)


def study_notes(jobs: Sequence[JobRow]) -> list[str]:
    """Say where the jobs of trials are to be found, and which studies have no sheet."""
    counted = Counter(row.job.rsplit("/", 2)[0] for row in jobs if of_trial(row))
    notes = []
    for row in (row for row in jobs if row.kind == KIND):
        count = counted[row.name]
        said = f"{count} {'job' if count == 1 else 'jobs'} of the trials of {row.name}"
        if row.state is JobState.DONE:
            notes.append(f"{said} are left to its own sheet, and are no arms.")
        elif row.state is JobState.FAILED:
            cause = f" ({row.cause.value})" if row.cause else ""
            why = (row.message or "").strip().split("\n")[0]
            notes.append(f"{row.name} failed{cause}" + (f": {why}." if why else "."))
            notes.append(f"{said} are no arms, and {row.name} has no sheet.")
        elif count:
            notes.append(f"{said} are no arms; {row.name} has a sheet when it is done.")
    return notes


def _read(row: JobRow, result: Mapping[str, Any], by_name: Mapping[str, JobRow]) -> Study:
    spec = row.spec
    objectives, seeds = dict(spec["objectives"]), len(spec["arms"])
    limits = [limit["metric"] for limit in spec["constraints"]]
    baseline = {m: _number(raw, seeds) for m, raw in (result.get("baseline") or {}).items()}
    trials = tuple(_trial(raw, seeds, baseline) for raw in result["trials"])
    against = by_name.get(spec["arms"][0]["parents"].get("baseline", ""))
    importances = result.get("importances")
    return Study(
        id=row.name,
        sampler=spec["sampler"],
        asked=spec["trials"],
        seeds=seeds,
        objectives=objectives,
        constraints=tuple(limit_text(limit) for limit in spec["constraints"]),
        metrics=tuple(dict.fromkeys((*objectives, *limits))),
        space={dimension["path"]: dimension for dimension in spec["space"]},
        trials=trials,
        against=arm_name(against.job, against.axes, "") if against and baseline else None,
        baseline=baseline,
        best=result.get("best"),
        front=tuple(result.get("front") or ()),
        importances=None
        if importances is None
        else {name: _ordered(shares) for name, shares in importances.items()},
        ended=result.get("ended"),
        progress=_progress([t for t in trials if t.same_as is None], objectives),
        pruned=result.get("pruned"),
        promoted=result.get("promoted"),
        confirmed=_confirmed(result.get("confirmed")),
    )


def _confirmed(raw: Mapping[str, Any] | None) -> Confirmed | None:
    if raw is None or raw["state"] == "running":
        return None
    seeds = tuple(raw["seeds"])
    numbers = {name: _number(one, len(seeds)) for name, one in raw["measured"].items()}
    return Confirmed(seeds, numbers, raw["message"])


def _trial(raw: Mapping[str, Any], seeds: int, baseline: Mapping[str, Number]) -> Trial:
    complete = raw["state"] == COMPLETE
    numbers = {name: _number(one, seeds) for name, one in (raw.get("measured") or {}).items()}
    if complete:
        numbers = {name: _against(name, one, baseline.get(name)) for name, one in numbers.items()}
    infinite = [metric_of(n).title for n, one in numbers.items() if not isfinite(one.value or 0.0)]
    message = (raw.get("message") or "").strip().split("\n")[0] or None
    if raw["state"] == "failed" and message is None:
        message = f"its {infinite[0]} is no finite number" if infinite else "no reason is known"
    constraints = dict(raw.get("constraints") or {})
    return Trial(
        number=raw["number"],
        values=raw["values"],
        state=raw["state"],
        numbers=numbers,
        beyond=constraints,
        same_as=raw.get("same_as"),
        message=message,
        feasible=complete and all(beyond <= 0 for beyond in constraints.values()),
    )


def _number(raw: Mapping[str, Any], expected: int) -> Number:
    seeds = dict(raw["seeds"])
    return Number(
        raw["value"],
        seeds=seeds,
        expected=expected,
        sd=summarise(list(seeds.values())).sd if seeds else None,
        low=raw["low"],
        high=raw["high"],
        void=raw["void"],
    )


def _against(metric: str, number: Number, baseline: Number | None) -> Number:
    if baseline is None or not (number.stands and baseline.stands):
        return number
    if not isfinite(baseline.value or 0.0):
        return number
    return replace(number, change=change(metric_of(metric), _samples(number), _samples(baseline)))


def _samples(number: Number) -> dict[str, Sample]:
    """One for each seed; the interval of a single one is that of its repeats."""
    alone = len(number.seeds) == 1
    low, high = (number.low, number.high) if alone else (None, None)
    return {seed: Sample(value, low, high) for seed, value in number.seeds.items()}


def _values(trial: Trial, objectives: Mapping[str, Direction]) -> dict[str, float]:
    return {name: trial.value(name) for name in objectives}


def _progress(run: Sequence[Trial], objectives: Mapping[str, Direction]) -> Progress:
    best: dict[str, tuple[float | None, ...]] = {}
    for name, direction in objectives.items():
        better = min if direction == "minimize" else max
        so_far: list[float | None] = []
        for trial in run:
            found = [one for one in so_far[-1:] if one is not None]
            found += [trial.value(name)] if trial.feasible else []
            so_far.append(better(found, default=None))
        best[name] = tuple(so_far)
    return Progress(tuple(t.number for t in run), best, _hypervolume(run, objectives))


def _hypervolume(run: Sequence[Trial], objectives: Mapping[str, Direction]) -> tuple[float, ...]:
    """After each trial; empty for other than 2 or 3 objectives, and where one point is no box."""
    points = [losses(_values(trial, objectives), objectives) for trial in run if trial.feasible]
    if not 2 <= len(objectives) <= 3 or len(set(points)) < 2:
        return ()
    columns = list(zip(*points, strict=True))
    scaled = normalised(points, [min(c) for c in columns], [max(c) for c in columns])
    volumes = iter(hypervolumes(scaled, [REFERENCE] * len(objectives)))
    curve, reached = [], 0.0
    for trial in run:
        reached = next(volumes) / REFERENCE ** len(objectives) if trial.feasible else reached
        curve.append(reached)
    return tuple(curve)


def _ordered(shares: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(shares.items(), key=lambda one: (-one[1], one[0])))
