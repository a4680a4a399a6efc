"""What a user writes under `search:`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic.functional_validators import PlainValidator
from pydantic.json_schema import WithJsonSchema

from kvlab import KvlabError
from kvlab.platform.compare.metrics import METRICS
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.field import Path, nested, suggest, wrong
from kvlab.platform.jobs.kind import Kind, Parent, Settings, Surroundings
from kvlab.platform.jobs.reference import OWN, One
from kvlab.platform.search import pruners
from kvlab.platform.search.described import dimensions, samples, space_of, written_of
from kvlab.platform.search.samplers import SAMPLERS, check
from kvlab.platform.search.space import Space
from kvlab.platform.search.trials import BASELINE, FROM, Trials, ordered
from kvlab.platform.search.watch import unwatchable

if TYPE_CHECKING:
    from kvlab.platform.jobs.kind import References

Direction = Literal["minimize", "maximize"]
BOUND = re.compile(r"\s*(<=|>=)\s*([-+0-9.eE]+)\s*(?:\*\s*([A-Za-z_][\w-]*))?\s*")
PROMOTED = 10
"""Points of an earlier search that are tried first, if nothing is said."""
PLACES = {
    "evaluate": {
        "perplexity": "quality", "loss_by_position": "quality", "divergence": "divergence",
        "recall": "recall", "multi_turn": "multi_turn",
    },
    "benchmark": {"torch": "speed", "vllm": "serving"},
}  # fmt: skip
"""What a job is asked for -> the place of the metrics that it reports."""


class Trial(dict[str, Settings]):
    """The jobs of a trial by kind. Attributes: raw: what is written, own references filled in."""

    raw: dict[str, Any]


def _trial(written: Any) -> Trial:
    if isinstance(written, Trial):
        return written
    able = [kind for kind in KINDS if kind not in (IMPLICIT, "search")]
    if not isinstance(written, Mapping) or not written:
        raise wrong("must map kinds of job to their settings, such as {evaluate: {of: base}}")
    problems: list[tuple[Path, str]] = [
        ((kind,), f"unknown kind of job: {suggest(kind, able)}")
        for kind in written
        if kind not in able
    ]
    if problems:
        raise nested(problems)
    trial = Trial()
    trial.raw = {kind: _with_own(kind, raw or {}, written) for kind, raw in written.items()}
    for kind, raw in trial.raw.items():
        from kvlab.platform.spec.problems import from_pydantic

        try:
            trial[kind] = KINDS[kind].settings.model_validate(raw)
        except ValidationError as error:
            found = from_pydantic(error, raw, KINDS[kind].settings)
            problems += [((kind, *path), message) for path, message in found]
    if problems:
        raise nested(problems)
    return trial


def _with_own(name: str, raw: Any, trial: Mapping[str, Any]) -> Any:
    """Let a job of a trial name what the trial itself makes, where it names nothing else."""
    if not isinstance(raw, Mapping):
        return raw
    kind, before = KINDS[name], ordered(trial)[: ordered(trial).index(name)]
    found = dict(raw)
    fields = {column.alias or name for name, column in kind.settings.model_fields.items()}
    for role in kind.references:
        wanted = kind.reference_kinds.get(role)
        makers = [one for one in before if (one == wanted if wanted else KINDS[one].produces_model)]
        if role not in found and role in fields and makers:
            found[role] = OWN
    return found


def _space(written: Any) -> Any:
    if written == "auto" or isinstance(written, dict):
        return written
    raise wrong("must be auto, or map parameters to ranges, such as {h2o.recent: {int: [1, 8]}}")


class SearchSettings(Settings):
    """`search:` asks Optuna for points of a space and runs the jobs of a trial for each."""

    trial: Annotated[Trial, PlainValidator(_trial), WithJsonSchema({"type": "object"})]
    objectives: Annotated[
        dict[str, Direction], Field(min_length=1), WithJsonSchema({"type": ["object", "array"]})
    ]
    space: Annotated[
        Any,
        PlainValidator(_space),
        WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "object"}]}),
    ] = "auto"
    constraints: dict[str, str] = {}  # noqa: RUF012
    baseline: One | None = None
    from_: One | None = Field(default=None, alias="from")
    promote: int | None = Field(default=None, ge=1, le=10_000)
    start: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    trials: int = Field(default=30, ge=1, le=10_000)
    parallel: int = Field(default=2, ge=1, le=1_000)
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = Field(default=0, ge=0, lt=2**32)
    confirm: int = Field(default=0, ge=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def _named_baseline(cls, raw: Any) -> Any:
        """A constraint that names a job says what the baseline is."""
        if not isinstance(raw, Mapping):
            return raw
        found = dict(raw)
        if isinstance(raw.get("objectives"), list):
            found["objectives"] = {name: _direction(name) for name in raw["objectives"]}
        bounds = raw.get("constraints")
        if isinstance(bounds, Mapping) and BASELINE not in found:
            jobs = {bound.group(3) for text in bounds.values() if (bound := _bound(text))} - {None}
            if len(jobs) == 1:
                found[BASELINE] = jobs.pop()
        return found

    @model_validator(mode="after")
    def _possible(self) -> SearchSettings:
        problems = [*self._metric_problems(), *self._constraint_problems()]
        if self.sampler not in SAMPLERS:
            problems.append((("sampler",), f"unknown sampler: {suggest(self.sampler, SAMPLERS)}"))
        problems += self._pruner_problems()
        if self.promote is not None and self.from_ is None:
            said = "says how many points of another search: name that under `from`, or leave it out"
            problems.append((("promote",), said))
        if self.confirm and not any(KINDS[kind].produces_model for kind in self.trial):
            said = "no job of the trial trains anything: on another seed it would find the same"
            problems.append((("confirm",), said))
        for kind, settings in self.trial.items():
            for role in KINDS[kind].references:
                value = getattr(settings, role, None)
                if isinstance(value, tuple) and len(value) != 1:
                    path = ("trial", kind, role)
                    problems.append((path, "must name one job: a trial measures one model"))
        try:
            found = dimensions(self.trial.raw, self.space)
            if not found:
                said = "is empty: no method of the trial declares a range, so name some"
                problems.append((("space",), said))
            problems += _start_problems(Space(found), self.start)
        except KvlabError as error:
            where, _, said = str(error).partition(": ")
            problems.append(
                (("space", where) if isinstance(self.space, dict) else ("space",), said)
            )
        if problems:
            raise nested(problems)
        return self

    def _pruner_problems(self) -> Iterator[tuple[Path, str]]:
        if self.pruner == "none":
            return
        try:
            pruners.check(self.pruner, len(self.objectives))
        except KvlabError as error:
            yield ("pruner",), str(error).removeprefix("pruner: ")
        if not any(KINDS[kind].produces_model for kind in self.trial):
            yield ("pruner",), "no job of the trial trains anything: leave it out"
        elif unknown := unwatchable(self.objectives):
            yield (
                ("pruner",),
                f"nothing is known of {unknown[0]} while a trial trains: leave one of the two out",
            )

    def _metric_problems(self) -> Iterator[tuple[Path, str]]:
        reported = places(self.trial)
        for field in ("objectives", "constraints"):
            for name in getattr(self, field):
                if name.partition(".")[0] in self.trial:
                    continue  # KIND.KEY: what its result holds shows when it is there
                metric = METRICS.get(name)
                if metric is None:
                    yield (field, name), f"unknown metric: {suggest(name, list(METRICS))}"
                elif metric.place not in reported:
                    yield (
                        (field, name),
                        f"no job of the trial reports it: it is measured under '{metric.place}'",
                    )
        for name, direction in self.objectives.items():
            if name in METRICS and direction != _direction(name):
                yield ("objectives", name), f"{METRICS[name].better} is better: {_direction(name)}"

    def _constraint_problems(self) -> Iterator[tuple[Path, str]]:
        for name, text in self.constraints.items():
            bound = _bound(text)
            if bound is None:
                yield (
                    ("constraints", name),
                    f"must be '<= NUMBER', '>= NUMBER' or '<= NUMBER * JOB', found {text!r}",
                )
            elif bound.group(3) and (self.baseline is None or bound.group(3) != self.baseline.job):
                yield ("constraints", name), "names another job than the others: one baseline"
            elif bound.group(3) and name in METRICS and METRICS[name].place == "training":
                yield ("constraints", name), "what training takes is set against a number alone"


class Search(Kind):
    """Search a space of methods and their parameters; every trial is a few jobs."""

    name = "search"
    settings = SearchSettings
    inline = True
    measured = True
    spans_seeds = True
    incidental = frozenset({"folder", "machine", "parallel", "retries", "timeout"})

    @cached_property
    def references(self) -> References:  # type: ignore[override]
        return {**{role: "one" for role, _, _ in _roles()}, BASELINE: "one", FROM: "one"}

    @cached_property
    def reference_paths(self) -> Mapping[str, str]:  # type: ignore[override]
        return {role: path for role, path, _ in _roles()}

    @cached_property
    def reference_kinds(self) -> Mapping[str, str]:  # type: ignore[override]
        return {FROM: self.name, **{role: kind for role, _, kind in _roles() if kind is not None}}

    def takes_data(self, raw: Mapping[str, Any]) -> bool:
        trial = raw.get("trial")
        return isinstance(trial, Mapping) and any(
            kind in KINDS and KINDS[kind].needs_data for kind in trial
        )

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, SearchSettings)
        found = self._described(settings, around)
        sources, libraries = Trials("", found, _outside(around)).code()
        return {**found, "sources": sources, "libraries": libraries}

    def _described(self, settings: SearchSettings, around: Surroundings) -> dict[str, Any]:
        """The spec but for the code that its trials run."""
        return {
            "trial": settings.trial.raw,
            "space": [written_of(one) for one in dimensions(settings.trial.raw, settings.space)],
            "objectives": dict(settings.objectives),
            "constraints": [_limit(name, text) for name, text in settings.constraints.items()],
            "trials": settings.trials,
            "parallel": settings.parallel,
            "sampler": settings.sampler,
            "pruner": settings.pruner,
            "seed": settings.seed,
            "start": [dict(point) for point in settings.start],
            "promote": settings.promote or (PROMOTED if settings.from_ else None),
            "confirm": settings.confirm,
            "model": dict(around.model),
            "data": {k: v for k, v in around.data.items() if k not in ("contents", "folder")},
            "folder": around.data["folder"],
            "arms": [{"seed": around.seed, "parents": _names(around)}],
            "resources": {
                name: value
                for name in Resources.__slots__
                if (value := getattr(around.resources, name)) != getattr(Resources(), name)
            },
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, SearchSettings)
        space = Space(dimensions(settings.trial.raw, settings.space))
        try:
            check(settings.sampler, space, len(settings.objectives))
        except KvlabError as error:
            yield "sampler", str(error).removeprefix("sampler: ")
            return
        trials = Trials("", self._described(settings, around), _outside(around))
        problem = None
        for point in samples(space):
            problem = trials.problem(point)
            if problem is None:
                break
        else:
            yield "trial", str(problem)
        for number, point in enumerate(settings.start):
            if problem := trials.problem(point):
                yield f"start.{number}", problem
        if FROM in around.parents:
            earlier = {one.path for one in space_of(around.parents[FROM].spec)}
            if not earlier & {one.path for one in space.dimensions}:
                name = settings.from_.job if settings.from_ else ""
                yield FROM, f"'{name}' searched nothing of this space: {', '.join(sorted(earlier))}"

    def stand_in(self, name: str, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Parent:
        trials = Trials("", spec, {parent.name: parent for parent in parents.values()})
        space = Space(space_of(spec))
        points = ({}, *samples(space))
        values = next((one for one in points if trials.problem(one) is None), {})
        model = trials.model("", values, spec["arms"][0])
        return Parent(name, model.kind, model.spec, model.parents)

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        own = ("kvlab.platform.search", "kvlab.platform.jobs.search")
        return (*own, *spec["sources"])

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return ("optuna", *spec["libraries"])


def _start_problems(
    space: Space, points: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Path, str]]:
    for number, point in enumerate(points):
        try:
            space.admit(point)
        except KvlabError as error:
            yield ("start", number), str(error)


def places(trial: Mapping[str, Settings]) -> set[str]:
    """Where the numbers that a trial's jobs report belong; see `METRICS`."""
    found = set()
    for kind, settings in trial.items():
        for asked in (*getattr(settings, "metrics", ()), getattr(settings, "engine", None)):
            found.add(PLACES.get(kind, {}).get(str(asked)))
        if kind == "serve_benchmark":
            found.add("load")
        if KINDS[kind].produces_model:
            found.add("training")
    return {place for place in found if place is not None}


def _roles() -> Iterator[tuple[str, str, str | None]]:
    """Every reference that a job of a trial may have: role, path, and the kind it must name."""
    for name, kind in KINDS.items():
        if name not in (IMPLICIT, Search.name):
            for role in kind.references:
                path = kind.reference_paths.get(role, role)
                yield f"{name}.{role}", f"trial.{name}.{path}", kind.reference_kinds.get(role)


def _names(around: Surroundings) -> dict[str, str]:
    return {role: parent.name for role, parent in around.parents.items() if role != IMPLICIT}


def _outside(around: Surroundings) -> dict[str, Parent]:
    return {parent.name: parent for parent in around.parents.values()}


def _direction(name: str) -> Direction:
    lower = name not in METRICS or METRICS[name].better == "lower"
    return "minimize" if lower else "maximize"


def _bound(text: Any) -> re.Match[str] | None:
    found = BOUND.fullmatch(text) if isinstance(text, str) else None
    try:
        return found if found is not None and isfinite(float(found.group(2))) else None
    except ValueError:
        return None


def _limit(name: str, text: str) -> dict[str, Any]:
    bound = _bound(text)
    assert bound is not None
    sign, number, job = bound.groups()
    return {"metric": name, "sign": sign, "number": float(number), "of_baseline": job is not None}
