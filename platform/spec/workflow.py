"""A workflow as written, checked piece by piece so that one mistake does not hide the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.field import Path
from kvlab.platform.spec.document import DEEPEST, Document
from kvlab.platform.spec.problems import (
    Problem,
    WorkflowError,
    from_pydantic,
    known_keys,
    shown,
    unknown_key,
)
from kvlab.platform.spec.settings import (
    MOST_MATRIX_KEYS,
    NAME,
    NAME_RULE,
    JobSettings,
    WorkflowSettings,
)

MOST_PROBLEMS = 1_000


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
            workflow.blame((*path, key), unknown_key(key, allowed))


def _common(workflow: Workflow, path: Path, beside: Mapping[str, Any]) -> JobSettings | None:
    known = {key: value for key, value in beside.items() if key in JobSettings.model_fields}
    known.pop("matrix", None)
    try:
        return JobSettings.model_validate(known)
    except ValidationError as error:
        for below, message in from_pydantic(error, known, JobSettings):
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
    if parts[0] not in starts or not 2 <= len(parts) <= DEEPEST or not all(parts):
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
