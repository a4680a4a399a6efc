"""A workflow as written, checked piece by piece so that one mistake does not hide the others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import CoreSchema

from kvlab.db.states import Cause
from kvlab.platform.compare.metrics import METRICS
from kvlab.platform.graph import DEFAULT_RETRIES, Resources
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.data.settings import DataSettings
from kvlab.platform.jobs.field import Path, nested, suggest, wrong
from kvlab.platform.jobs.kind import Settings
from kvlab.platform.jobs.model import ModelSettings
from kvlab.platform.jobs.quantities import Bytes, Seconds
from kvlab.platform.spec.document import Document
from kvlab.platform.spec.problems import Problem, WorkflowError, from_pydantic, known_keys, shown

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "must be 1 to 64 letters, digits, '_', '-' or '.', and not start with '-' or '.'"
LARGEST_SEED = 2**32 - 1
MOST_SEEDS = 10_000
MOST_PROBLEMS = 1_000
MOST_MATRIX_KEYS = 16


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    first = {seed: index for index, seed in reversed(list(enumerate(seeds)))}
    again = [index for index, seed in enumerate(seeds) if first[seed] != index]
    if again:
        raise nested([((index,), f"is listed twice, found {seeds[index]}") for index in again])
    return seeds


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Seeds = Annotated[
    tuple[Seed, ...],
    Field(strict=False, min_length=1, max_length=MOST_SEEDS),
    AfterValidator(_distinct),
]
MOST_RETRIES = 100
Attempts = Annotated[int, Field(ge=0, le=MOST_RETRIES)]


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise wrong(f"unknown metric: {suggest(name, list(METRICS))}")
    return name


Metric = Annotated[
    str, AfterValidator(_known_metric), WithJsonSchema({"type": "string", "enum": list(METRICS)})
]


class ReportSettings(Settings):
    """`report:`: what a comparison sets everything against, and on which axes it is drawn."""

    baseline: str | None = None
    pareto: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = (
        "perplexity",
        "tokens_per_second",
        "kv_bytes_per_token",
    )


class ResourcesSettings(Settings):
    """`resources:` of a job: what each of its workers needs."""

    cpus: int | None = Field(default=None, ge=1, le=4096)
    gpus: int | None = Field(default=None, ge=0, le=1024)
    memory: Bytes | None = Field(default=None, ge=1)
    workers: int | None = Field(default=None, ge=1, le=4096)


class RetriesSettings(Settings):
    """`retries:` of a job: attempts beyond the first, by cause, or one number for every cause."""

    node_lost: Attempts | None = None
    out_of_memory: Attempts | None = None
    infrastructure: Attempts | None = None

    @model_validator(mode="before")
    @classmethod
    def _for_all(cls, written: Any) -> Any:
        if isinstance(written, int) and not isinstance(written, bool):
            if not 0 <= written <= MOST_RETRIES:
                raise wrong(f"must be from 0 to {MOST_RETRIES}")
            return dict.fromkeys(cls.model_fields, written)
        return written

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: Any) -> dict[str, Any]:
        by_cause = handler.resolve_ref_schema(handler(core))
        number = {"type": "integer", "minimum": 0, "maximum": MOST_RETRIES}
        return {"anyOf": [number, dict(by_cause)]}


class JobSettings(Settings):
    """What stands beside a job's kind."""

    matrix: dict[str, Any] | None = None
    seeds: Seeds | None = None
    needs: Annotated[tuple[str, ...], Field(strict=False)] = ()
    resources: ResourcesSettings = ResourcesSettings()
    retries: RetriesSettings = RetriesSettings()
    timeout: Seconds | None = Field(default=None, gt=0)


class WorkflowSettings(Settings):
    """The whole YAML but for what stands inside a job."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    seeds: Seeds = (0,)
    model: ModelSettings | None = None  # type: ignore[valid-type]
    data: DataSettings | None = None
    jobs: dict[str, Any]
    report: ReportSettings = ReportSettings()


@dataclass(frozen=True, slots=True)
class JobEntry:
    """One job as written: `raw` is what stands under its kind, `common` what stands beside it."""

    name: str
    kind: str
    raw: dict[str, Any]
    matrix: Mapping[str, tuple[Any, ...]]
    common: JobSettings

    @property
    def path(self) -> Path:
        return ("jobs", self.name)


@dataclass(slots=True)
class Workflow:
    """What could be read of a workflow, and every mistake so far.

    Attributes:
        top: the parts of the top level that are sound, by key.
        jobs: the jobs whose shape is sound. broken: names of all jobs with a mistake.
    """

    document: Document
    top: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, JobEntry] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def blame(self, path: Path, message: str) -> None:
        """Record a mistake; a job it stands in is broken.

        Raises:
            WorkflowError: there are so many that the rest is not looked for.
        """
        if len(self.problems) >= MOST_PROBLEMS:
            more = self.document.problem((), f"has more than {MOST_PROBLEMS} mistakes")
            raise WorkflowError([*self.problems, more])
        self.problems.append(self.document.problem(path, message))
        if len(path) > 1 and path[0] == "jobs":
            self.broken.add(str(path[1]))


def read_workflow(document: Document) -> Workflow:
    """Check the top level and the shape of every job."""
    workflow = Workflow(document)
    _top(workflow)
    jobs = document.value.get("jobs")
    if isinstance(jobs, Mapping):
        if not jobs:
            workflow.blame(("jobs",), "must hold at least one job")
        for name, raw in jobs.items():
            _job(workflow, name, raw)
    return workflow


def _top(workflow: Workflow) -> None:
    raw = workflow.document.value
    mistaken: set[str | int] = set()
    try:
        WorkflowSettings.model_validate(raw)
    except ValidationError as error:
        for path, message in from_pydantic(error, raw, WorkflowSettings):
            if path == ("name",) and "pattern" in message:
                message = f"{NAME_RULE}, found {shown(raw['name'])}"
            workflow.blame(path, message)
            mistaken.update(path[:1])
    for key, column in WorkflowSettings.model_fields.items():
        if key in mistaken or (key not in raw and column.is_required()):
            continue
        whole = {"version": 1, "name": "x", "jobs": {}} | ({key: raw[key]} if key in raw else {})
        workflow.top[key] = getattr(WorkflowSettings.model_validate(whole), key)


def _job(workflow: Workflow, name: str, raw: Any) -> None:
    path: Path = ("jobs", name)
    if not NAME.fullmatch(name):
        workflow.blame(path, f"a job's name {NAME_RULE}, found {shown(name)}")
    elif name == IMPLICIT:
        workflow.blame(path, f"'{IMPLICIT}' is the name of the job that prepares `data:`")
    if not isinstance(raw, Mapping):
        workflow.blame(path, f"must be a mapping with one kind of job, found {shown(raw)}")
        return
    kinds = [key for key in raw if key in KINDS and key != IMPLICIT]
    beside = {key: value for key, value in raw.items() if key not in kinds}
    _unknown(workflow, path, beside)
    if len(kinds) > 1:
        workflow.blame(path, f"must be exactly one kind of job, found {' and '.join(kinds)}")
    elif not kinds and set(beside) <= set(JobSettings.model_fields):
        workflow.blame(path, f"must be one kind of job: {', '.join(written_kinds())}")
    common = _common(workflow, path, beside)
    matrix = _matrix(workflow, path, raw["matrix"], kinds) if "matrix" in raw else {}
    if common is None or matrix is None or len(kinds) != 1:
        return
    settings = {} if raw[kinds[0]] is None else raw[kinds[0]]
    if not isinstance(settings, dict):
        workflow.blame((*path, kinds[0]), f"must be a mapping, found {shown(settings)}")
        return
    workflow.jobs[name] = JobEntry(name, kinds[0], settings, matrix, common)


def written_kinds() -> list[str]:
    """Kinds that may be written as a job."""
    return [kind for kind in KINDS if kind != IMPLICIT]


def _unknown(workflow: Workflow, path: Path, beside: Mapping[str, Any]) -> None:
    allowed = [*written_kinds(), *known_keys(JobSettings, ())]
    for key in beside:
        if key not in JobSettings.model_fields:
            workflow.blame((*path, key), f"unknown key: {suggest(key, allowed)}")


def _common(workflow: Workflow, path: Path, beside: Mapping[str, Any]) -> JobSettings | None:
    known = {key: value for key, value in beside.items() if key in JobSettings.model_fields}
    known.pop("matrix", None)
    try:
        return JobSettings.model_validate(known)
    except ValidationError as error:
        for below, message in dict(from_pydantic(error, known, JobSettings)).items():
            workflow.blame((*path, *below), message)
        return None


def _matrix(
    workflow: Workflow, path: Path, raw: Any, kinds: Sequence[str]
) -> dict[str, tuple[Any, ...]] | None:
    """Return dotted path -> values; None after a mistake."""
    path = (*path, "matrix")
    mistakes: list[tuple[Path, str]] = []
    if not isinstance(raw, Mapping):
        mistakes.append(((), f"must map dotted paths to lists of values, found {shown(raw)}"))
    elif not raw:
        mistakes.append(((), "is empty: give a dotted path and its values, or leave it out"))
    elif len(raw) > MOST_MATRIX_KEYS:
        mistakes.append(((), f"must have at most {MOST_MATRIX_KEYS} keys, found {len(raw)}"))
    else:
        starts = [*kinds[:1], "resources"]
        for key, values in raw.items():
            mistakes += [((key,), m) for m in _matrix_key(key, list(raw), starts)]
            mistakes += [((key, *below), m) for below, m in _matrix_values(values)]
    for below, message in mistakes:
        workflow.blame((*path, *below), message)
    return None if mistakes else {key: tuple(values) for key, values in raw.items()}


def _matrix_key(key: str, keys: Sequence[str], starts: Sequence[str]) -> Iterator[str]:
    parts = key.split(".")
    if parts[0] not in starts or len(parts) < 2 or not all(parts):
        yield f"must be a dotted path that starts with {' or '.join(f'{s}.' for s in starts)}"
    if above := [other for other in keys if key.startswith(f"{other}.")]:
        yield f"stands below '{above[0]}', which the matrix also sets"


def _matrix_values(values: Any) -> Iterator[tuple[Path, str]]:
    if not isinstance(values, list):
        yield (), f"must be a list of values, found {shown(values)}"
        return
    if not values:
        yield (), "is an empty list: the job would have no cells"
    seen: set[str] = set()
    for index, value in enumerate(values):
        text = json.dumps(value, sort_keys=True)
        if text in seen:
            yield (index,), f"is listed twice, found {shown(value)}"
        seen.add(text)


def resources_of(kind: str, settings: ResourcesSettings) -> Resources:
    """Return a kind's resources with what the job says put in."""
    default = KINDS[kind].resources
    return Resources(
        cpus=settings.cpus or default.cpus,
        gpus=default.gpus if settings.gpus is None else settings.gpus,
        memory=settings.memory or default.memory,
        workers=settings.workers or default.workers,
        exclusive=default.exclusive,
    )


def retries_of(settings: RetriesSettings) -> dict[Cause, int]:
    """Return retry budgets by cause."""
    written = settings.model_dump(exclude_none=True)
    return {cause: written.get(cause.value, default) for cause, default in DEFAULT_RETRIES.items()}
