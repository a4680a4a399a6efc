"""Each job's combinations of matrix values, validated against its kind's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kvlab.platform.graph import Resources
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.field import Path
from kvlab.platform.jobs.kind import Kind, Settings
from kvlab.platform.jobs.reference import OWN, Reference
from kvlab.platform.spec.matrix import Combination, Unreachable, combinations
from kvlab.platform.spec.problems import from_pydantic
from kvlab.platform.spec.settings import ResourcesSettings, resources_of
from kvlab.platform.spec.workflow import JobEntry, Workflow


@dataclass(frozen=True, slots=True)
class Variant:
    """A job at one point of its matrix, before seeds and parents.

    `references`: role -> the jobs it names there, in the order written.
    """

    combination: Combination
    settings: Settings
    references: Mapping[str, tuple[Reference, ...]]
    resources: Resources


def variants(workflow: Workflow, job: JobEntry) -> list[Variant]:
    """Return a job's sound variants; mistakes go to the workflow."""
    found: list[Variant] = []
    try:
        for combination in combinations(job):
            variant = _variant(workflow, job, combination)
            if variant is not None:
                found.append(variant)
    except Unreachable as error:
        workflow.blame((*job.path, "matrix", error.key), str(error))
    return found


def _variant(workflow: Workflow, job: JobEntry, combination: Combination) -> Variant | None:
    kind = KINDS[job.kind]
    sound = True
    try:
        settings = kind.settings.model_validate(combination.raw)
    except ValidationError as error:
        sound = False
        for path, message in from_pydantic(error, combination.raw, kind.settings):
            place = written_at(job, combination, (job.kind, *path))
            if message.startswith("unknown key") and place in combination.origins.values():
                place = place[:-1]  # the dotted path is wrong, whatever the value
            workflow.blame(place, message)
    beside = {**job.common.resources.model_dump(exclude_none=True), **combination.beside}
    try:
        resources = resources_of(job.kind, ResourcesSettings.model_validate(beside))
    except ValidationError as error:
        sound = False
        for path, message in from_pydantic(error, beside, ResourcesSettings):
            workflow.blame(written_at(job, combination, ("resources", *path)), message)
    if not sound:
        return None
    if resources.workers > 1 and not kind.gang:
        path = written_at(job, combination, ("resources", "workers"))
        workflow.blame(path, f"{job.kind} runs as one worker, found {resources.workers}")
        return None
    return Variant(combination, settings, references_of(kind, settings), resources)


def written_at(job: JobEntry, combination: Combination, below: Path) -> Path:
    """Return where a setting was written: in the job itself, or in its matrix."""
    text = ".".join(map(str, below))
    for key, origin in combination.origins.items():
        if text == key or text.startswith(f"{key}."):
            return (*origin, *below[len(key.split(".")) :])
    for key, origin in combination.origins.items():
        if key.startswith(f"{text}."):
            return origin
    return (*job.path, *below)


def references_of(kind: Kind, settings: Settings) -> dict[str, tuple[Reference, ...]]:
    """Return the references of each role that is filled in."""
    found: dict[str, tuple[Reference, ...]] = {}
    for role in kind.references:
        value: Any = settings
        for part in reference_path(kind, role):
            value = _field(value, part)
        named = (value,) if isinstance(value, Reference) else tuple(value or ())
        if outside := tuple(reference for reference in named if reference.job != OWN):
            found[role] = outside
    return found


def reference_path(kind: Kind, role: str) -> tuple[str, ...]:
    """Return the keys that lead to a role's field."""
    return tuple(kind.reference_paths.get(role, role).split("."))


def _field(settings: Any, key: str) -> Any:
    if settings is None:
        return None
    if isinstance(settings, Mapping):
        return settings.get(key)
    for name, column in type(settings).model_fields.items():
        if key in (name, column.alias):
            return getattr(settings, name)
    raise LookupError(key)


def reference_places(
    job: JobEntry, variant: Variant, role: str
) -> Iterator[tuple[Reference, Path]]:
    """Yield each reference of a role and where it is written."""
    path = (job.kind, *reference_path(KINDS[job.kind], role))
    raw: Any = variant.combination.raw
    for number, part in enumerate(path[1:], 1):
        if part not in raw:  # something else in the job says it
            raw, path = None, path[:number]
            break
        raw = raw[part]
    for index, reference in enumerate(variant.references[role]):
        below: Path = (*path, index) if isinstance(raw, list) else path
        yield reference, written_at(job, variant.combination, below)
