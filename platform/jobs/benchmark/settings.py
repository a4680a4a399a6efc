"""What a user writes under `benchmark:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvlab.methods.axis import Method
from kvlab.methods.registry import resolve
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import given
from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.field import nested
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.method import MethodField, axis_sources, canonical, compatible, short_of
from kvlab.platform.jobs.model import MODEL_SOURCES, lineage, method_of
from kvlab.platform.jobs.quantities import Bytes
from kvlab.platform.jobs.reference import Many, One
from kvlab.platform.jobs.served import SERVER_SOURCES, distribution, unserved

BatchSize = Annotated[int, Field(ge=1, le=65536)]


class BenchmarkSettings(Settings):
    """`benchmark:` measures prefill, decode and memory, with the node to itself."""

    of: Many
    prompt: int = Field(default=128, ge=1, le=2**20)
    generate: int = Field(default=128, ge=1, le=2**20)
    batch: Annotated[tuple[BatchSize, ...], Field(strict=False, min_length=1)] = (1, 8, 32)
    repeats: int = Field(default=5, ge=1, le=1000)
    warmup: int = Field(default=1, ge=0, le=100)
    apply: Annotated[Method, MethodField("run")] = Field(default_factory=lambda: resolve({}))
    budgets: One | None = None
    controller: One | None = None
    kv_budget: Bytes | None = Field(default=None, ge=1)
    dtype: Dtype = "auto"
    engine: Literal["torch", "vllm"] = "torch"
    cuda_graph: bool = True

    @model_validator(mode="after")
    def _distinct(self) -> BenchmarkSettings:
        if len(set(self.batch)) != len(self.batch):
            raise nested([(("batch",), "must not name a batch size twice")])
        return self


class Benchmark(Kind):
    """Measure how fast and with how much memory a model generates."""

    name = "benchmark"
    settings = BenchmarkSettings
    references: ClassVar[References] = {"of": "many", **given.REFERENCES}
    reference_kinds = given.KINDS
    measured = True
    resources = Resources(exclusive=True)

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, BenchmarkSettings)
        engine = {} if settings.engine == "torch" else {"engine": settings.engine}
        return {
            **engine,
            **({} if settings.cuda_graph else {"cuda_graph": False}),
            **given.spec_of(settings),
            "prompt": settings.prompt,
            "generate": settings.generate,
            "batch": list(settings.batch),
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "apply": canonical(settings.apply),
            "kv_budget": settings.kv_budget,
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, BenchmarkSettings)
        config, trained = lineage(around.parents["of"])
        made = method_of(trained)
        yield from compatible(settings.apply, config, "apply", trained=made)
        yield from short_of(settings.apply, made, settings.prompt, "apply")
        yield from given.problems(settings.apply, around)
        if settings.engine == "vllm":
            yield from unserved(settings.apply, around.parents["of"])
            if not settings.cuda_graph:
                yield "cuda_graph", "is of the torch engine alone: leave it out beside engine: vllm"
        if settings.prompt + settings.generate > config.max_positions:
            yield (
                "generate",
                f"prompt and generate must be at most the model's max_positions "
                f"({config.max_positions}), found {settings.prompt} + {settings.generate}",
            )

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (distribution(),) if spec.get("engine") == "vllm" else ()

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            *(SERVER_SOURCES if spec.get("engine") == "vllm" else ()),
            "kvlab.methods.budget.cost",
            "kvlab.methods.decoder.graph",
            "kvlab.platform.jobs.checkpoint",
            "kvlab.platform.jobs.benchmark",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.memory",
            *MODEL_SOURCES,
            *axis_sources(method_of(spec["apply"])),
            *given.sources(spec),
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.cost import generating

        return generating(*lineage(parents["of"]), spec)
