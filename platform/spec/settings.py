"""The settings of a workflow outside of what stands under a job's kind."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from kvlab.db.states import Cause
from kvlab.platform.compare.metrics import METRICS
from kvlab.platform.graph import DEFAULT_RETRIES, Resources
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.data.settings import DataSettings
from kvlab.platform.jobs.field import nested, suggest, wrong
from kvlab.platform.jobs.kind import Settings
from kvlab.platform.jobs.model import ModelSettings
from kvlab.platform.jobs.quantities import Bytes, Seconds

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "must be 1 to 64 letters, digits, '_', '-' or '.', and not start with '-' or '.'"
VERSION = 1
LARGEST_SEED = 2**32 - 1
MOST_SEEDS = 10_000
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


def _known_version(version: Any) -> Any:
    if type(version) is not int or version != VERSION:
        raise wrong(f"must be {VERSION}")
    return version


Version = Annotated[int, BeforeValidator(_known_version), WithJsonSchema({"const": VERSION})]
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

    version: Version
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    seeds: Seeds = (0,)
    model: ModelSettings | None = None  # type: ignore[valid-type]
    data: DataSettings | None = None
    jobs: dict[str, Any]
    report: ReportSettings = ReportSettings()


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
