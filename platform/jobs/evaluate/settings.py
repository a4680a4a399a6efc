"""What a user writes under `evaluate:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from kvlab.methods.axis import Method
from kvlab.methods.registry import resolve
from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.method import MethodField, axis_sources, canonical, compatible
from kvlab.platform.jobs.model import MODEL_SOURCES, lineage, method_of
from kvlab.platform.jobs.quantities import Count
from kvlab.platform.jobs.reference import Many

Metric = Literal["perplexity", "loss_by_position"]


class EvaluateSettings(Settings):
    """`evaluate:` scores models on held-out text, all on the same target tokens."""

    of: Many
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = ("perplexity",)
    apply: Annotated[Method, MethodField("run")] = Field(default_factory=lambda: resolve({}))
    sequence_length: int | None = Field(default=None, ge=2, le=2**20)
    tokens: Count = Field(default=100_000, ge=1)
    batch_size: int = Field(default=16, ge=1, le=65536)
    dtype: Dtype = "auto"


class Evaluate(Kind):
    """Score a model on held-out tokens that every arm of the job predicts."""

    name = "evaluate"
    settings = EvaluateSettings
    references: ClassVar[References] = {"of": "many"}
    needs_data = True

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        from kvlab.platform.jobs.cost import first_target

        assert isinstance(settings, EvaluateSettings)
        arms = around.siblings.get("of") or (around.parents["of"],)
        return {
            "metrics": list(settings.metrics),
            "apply": canonical(settings.apply),
            "sequence_length": settings.sequence_length or around.data["sequence_length"],
            "tokens": settings.tokens,
            "batch_size": settings.batch_size,
            "first_target": max(first_target(*lineage(arm)) for arm in arms),
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, EvaluateSettings)
        config, trained = lineage(around.parents["of"])
        length = settings.sequence_length or around.data["sequence_length"]
        made = method_of(trained)
        yield from compatible(settings.apply, config, "apply", trained=made)
        span = made.span()
        if length % span or length < 2 * span:
            yield (
                "sequence_length",
                f"must be two or more blocks of '{around.parents['of'].name}', whose block length "
                f"is {span}, found {length}",
            )
        if length > config.max_positions:
            yield (
                "sequence_length",
                f"must be at most the model's max_positions ({config.max_positions}), "
                f"found {length}",
            )

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.platform.data.corpus",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.evaluate",
            *MODEL_SOURCES,
            *axis_sources(method_of(spec["apply"])),
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.cost import scoring

        return scoring(*lineage(parents["of"]), spec)
