"""What a user writes under `serve_benchmark:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from kvlab.methods.axis import Method
from kvlab.methods.registry import resolve
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import given
from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.field import nested
from kvlab.platform.jobs.kind import Kind, References, Settings, Surroundings
from kvlab.platform.jobs.method import MethodField, axis_sources, canonical, compatible
from kvlab.platform.jobs.model import MODEL_SOURCES, lineage, method_of
from kvlab.platform.jobs.quantities import Bytes
from kvlab.platform.jobs.reference import Many, One
from kvlab.platform.jobs.served import SERVER_SOURCES, distribution, unserved

Rate = Annotated[float, Field(gt=0, le=100_000)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Lengths = Tokens | Annotated[tuple[Tokens, Tokens], Field(strict=False)]


class Slo(Settings):
    """What an answer must keep to count as good: seconds to its first token, and between two."""

    first_token: float = Field(default=1.0, gt=0)
    between_tokens: float = Field(default=0.2, gt=0)


class ServeBenchmarkSettings(Settings):
    """`serve_benchmark:` drives the HTTP server with requests that come at given rates."""

    of: Many
    apply: Annotated[Method, MethodField("run")] = Field(default_factory=lambda: resolve({}))
    budgets: One | None = None
    controller: One | None = None
    rates: Annotated[tuple[Rate, ...], Field(strict=False, min_length=1)] = (1.0, 2.0, 4.0)
    requests: int = Field(default=64, ge=1, le=1_000_000)
    prompt: Lengths = 128
    generate: Lengths = 64
    turns: int = Field(default=1, ge=1, le=64)
    shared_prefix: int = Field(default=0, ge=0, le=2**20)
    slo: Slo = Field(default_factory=Slo)
    memory: Bytes = Field(default=256 << 20, ge=1)
    concurrency: int = Field(default=256, ge=1, le=65536)
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _in_order(self) -> ServeBenchmarkSettings:
        for name in ("prompt", "generate"):
            low, high = pair(getattr(self, name))
            if low > high:
                raise nested([((name,), f"must be [least, most], found [{low}, {high}]")])
        if len(set(self.rates)) != len(self.rates):
            raise nested([(("rates",), "must not name a rate twice")])
        return self

    @property
    def longest(self) -> int:
        """Tokens of a request at most."""
        each = pair(self.prompt)[1] + pair(self.generate)[1]
        return self.shared_prefix + self.turns * each


def pair(lengths: int | tuple[int, int]) -> tuple[int, int]:
    """Least and most, of one number too."""
    return (lengths, lengths) if isinstance(lengths, int) else lengths


class ServeBenchmark(Kind):
    """Measure a served model under load: latencies, throughput, what a rate costs."""

    name = "serve_benchmark"
    settings = ServeBenchmarkSettings
    references: ClassVar[References] = {"of": "many", **given.REFERENCES}
    reference_kinds = given.KINDS
    measured = True
    resources = Resources(exclusive=True)

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, ServeBenchmarkSettings)
        return {
            **given.spec_of(settings),
            "apply": canonical(settings.apply),
            "rates": list(settings.rates),
            "requests": settings.requests,
            "prompt": list(pair(settings.prompt)),
            "generate": list(pair(settings.generate)),
            "turns": settings.turns,
            "shared_prefix": settings.shared_prefix,
            "slo": settings.slo.model_dump(),
            "memory": settings.memory,
            "concurrency": settings.concurrency,
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, ServeBenchmarkSettings)
        config, trained = lineage(around.parents["of"])
        yield from compatible(settings.apply, config, "apply", trained=method_of(trained))
        yield from given.problems(settings.apply, around)
        yield from unserved(settings.apply, around.parents["of"])
        low, high = pair(settings.prompt)
        if settings.budgets and (low < high or settings.turns > 1 or settings.shared_prefix):
            yield (
                "budgets",
                "are divided for prompts of one length: give prompt one number, and no turns or "
                "shared_prefix",
            )
        if settings.longest > config.max_positions:
            yield (
                "prompt",
                f"shared_prefix and turns of prompt and generate are {settings.longest} tokens, "
                f"and the model's max_positions {config.max_positions}",
            )

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (distribution(),)

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.platform.jobs.benchmark",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.memory",
            "kvlab.platform.jobs.serve_benchmark",
            *SERVER_SOURCES,
            *MODEL_SOURCES,
            *axis_sources(method_of(spec["apply"])),
            *given.sources(spec),
        )
