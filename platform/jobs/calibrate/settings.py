"""What a user writes under `calibrate:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.field import nested
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.model import MODEL_SOURCES, beyond_positions, lineage, method_of
from kvlab.platform.jobs.reference import Many

Importance = Literal["cosine", "mass"]
LEAST_LAYERS = 3
"""Three groups need as many layers."""
WHOLE_PREFILL = {"prefill": {"prefill": {"early_exit": False, "passes": None}}}
"""Every layer sees every row: all of them are measured."""


class CalibrateSettings(Settings):
    """`calibrate:` measures how important each layer's attention is, and fixes budgets by it."""

    of: Many
    samples: int = Field(default=64, ge=2, le=65536)
    sequence_length: int | None = Field(default=None, ge=2, le=2**20)
    part: Literal["train", "heldout"] = "train"
    sections: int = Field(default=2, ge=1, le=64)
    importance: Annotated[tuple[Importance, ...], Field(strict=False, min_length=1)] = (
        "cosine",
        "mass",
    )
    p: float | None = Field(default=0.35, ge=0.01, le=1)
    batch_size: int = Field(default=8, ge=1, le=65536)
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _possible(self) -> CalibrateSettings:
        problems = []
        if 2 * self.sections > self.samples:
            message = f"must be at most half of samples ({self.samples}), found {self.sections}"
            problems.append((("sections",), message))
        if len(set(self.importance)) != len(self.importance):
            problems.append((("importance",), "must not name an importance twice"))
        if problems:
            raise nested(problems)
        return self


class Calibrate(Kind):
    """Measure layers over many prompts; later jobs take the budgets by `budgets:`."""

    name = "calibrate"
    settings = CalibrateSettings
    references: ClassVar[References] = {"of": "many"}
    needs_data = True

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, CalibrateSettings)
        return {
            "samples": settings.samples,
            "sequence_length": settings.sequence_length or around.data["sequence_length"],
            "part": settings.part,
            "sections": settings.sections,
            "importance": list(settings.importance),
            "p": settings.p,
            "batch_size": settings.batch_size,
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, CalibrateSettings)
        model = around.parents["of"]
        config, trained = lineage(model)
        made = method_of(trained)
        length, span = settings.sequence_length or around.data["sequence_length"], made.span()
        owners = len(made.acting(config).kv_layers)
        if owners < LEAST_LAYERS:
            yield (
                "of",
                f"'{model.name}' has {owners} {'layer' if owners == 1 else 'layers'} with keys "
                f"and values of their own: three groups of layers need {LEAST_LAYERS} or more",
            )
        if length % span:
            yield (
                "sequence_length",
                f"must be whole blocks of '{model.name}', whose block length is {span}, "
                f"found {length}",
            )
        yield from beyond_positions(length, config)

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.methods.budget",
            "kvlab.methods.cache.importance",
            "kvlab.platform.data.corpus",
            "kvlab.platform.jobs.calibrate",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.evaluate.windows",
            *MODEL_SOURCES,
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.flops import cost_under

        cost = cost_under(*lineage(parents["of"]), WHOLE_PREFILL)
        return Prediction(
            parameters=cost.total_parameters(),
            body_parameters=cost.body_parameters(),
            flops=spec["samples"] * cost.prefill_flops(spec["sequence_length"]),
        )
