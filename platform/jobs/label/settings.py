"""What a user writes under `label:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.model import MODEL_SOURCES, beyond_positions, lineage, method_of
from kvlab.platform.jobs.reference import One


class LabelSettings(Settings):
    """`label:` marks the tokens that full attention attends to most, for each token of a text."""

    of: One
    top: int = Field(default=96, ge=1, le=4096)
    aggregate: Literal["mean", "max"] = "mean"
    per: Literal["model", "layer"] = "model"
    samples: int = Field(default=512, ge=1, le=10_000_000)
    held_out: int = Field(default=64, ge=1, le=1_000_000)
    sequence_length: int | None = Field(default=None, ge=2, le=2**15)
    batch_size: int = Field(default=8, ge=1, le=65536)
    dtype: Dtype = "auto"


class Label(Kind):
    """Label texts with what a model attends to; a controller learns to tell it beforehand."""

    name = "label"
    settings = LabelSettings
    references: ClassVar[References] = {"of": "one"}
    needs_data = True

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, LabelSettings)
        return {
            "top": settings.top,
            "aggregate": settings.aggregate,
            "per": settings.per,
            "samples": settings.samples,
            "held_out": settings.held_out,
            "sequence_length": settings.sequence_length or around.data["sequence_length"],
            "batch_size": settings.batch_size,
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, LabelSettings)
        model = around.parents["of"]
        config, trained = lineage(model)
        length = settings.sequence_length or around.data["sequence_length"]
        acting = method_of(trained).acting(config)
        if "granularity" in trained or acting.upward:
            yield (
                "of",
                f"labels are what full attention attends to, and '{model.name}' is "
                f"{', '.join(name for choice in trained.values() for name in choice)}: "
                "name a job with full attention",
            )
        if settings.top >= length:
            yield (
                "top",
                f"must be below the {length} tokens of a text, found {settings.top}: "
                "else every token is labelled",
            )
        yield from beyond_positions(length, config)

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.methods.eviction.adore.labels",
            "kvlab.platform.data.corpus",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.evaluate.windows",
            "kvlab.platform.jobs.label",
            *MODEL_SOURCES,
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.flops import cost_under

        cost = cost_under(*lineage(parents["of"]), {})
        texts = spec["samples"] + spec["held_out"]
        return Prediction(
            parameters=cost.total_parameters(),
            body_parameters=cost.body_parameters(),
            flops=texts * cost.prefill_flops(spec["sequence_length"]),
        )
