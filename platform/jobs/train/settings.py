"""What a user writes under `train:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvlab.methods.axis import TRAIN_TIME, Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.jobs.checkpoint import trained_method, written
from kvlab.platform.jobs.field import nested
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, Settings, Surroundings
from kvlab.platform.jobs.method import MethodField, axis_sources, canonical, compatible, uptrained
from kvlab.platform.jobs.model import (
    CHECKPOINT_SOURCES,
    MODEL_SOURCES,
    ModelError,
    ModelSettings,
    beyond_positions,
    config_of,
    method_of,
    resolve_model,
)
from kvlab.platform.jobs.quantities import Count

INCIDENTAL = frozenset({"checkpoint_every", "log_every", "parallel"})
"""How often to save and to log, and how a gang divides its memory, change no weight."""

TRAINING_SOURCES = (
    "kvlab.methods.eviction.full.cost",
    "kvlab.platform.data.corpus",
    "kvlab.platform.jobs.flops",
    "kvlab.platform.jobs.memory",
    "kvlab.platform.jobs.training",
)
"""What train and uptrain share, and what their results are measured with."""


class Optimization(Settings):
    """What train and uptrain share: how long, how fast, how exact."""

    method: Annotated[Method, MethodField("train")]
    tokens: Count = Field(ge=0)
    sequence_length: int | None = Field(default=None, ge=2, le=2**20)
    batch_size: int = Field(default=16, ge=1, le=65536)
    accumulate: int = Field(default=1, ge=1, le=65536)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0, le=10)
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False


class TrainSettings(Optimization):
    """`train:` from fresh weights, or on from a checkpoint (`tokens: 0` takes it as it is)."""

    model: ModelSettings | None = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _some_tokens(self) -> TrainSettings:
        checkpoint = getattr(self.model, "checkpoint", None)
        if self.tokens == 0 and self.model is not None and checkpoint is None:
            raise nested([(("tokens",), "must be at least 1 for a model with fresh weights")])
        return self


class Train(Kind):
    """Train a model with a method's train-time axes."""

    name = "train"
    settings = TrainSettings
    needs_data = True
    produces_model = True
    gang = True
    incidental = INCIDENTAL

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, TrainSettings)
        model = _model(settings, around)
        return {
            "model": model,
            **optimization_spec(settings, around),
            "method": canonical(_method(settings, model)),
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, TrainSettings)
        model = _model(settings, around)
        if settings.tokens == 0 and "checkpoint" not in model:
            yield "tokens", "must be at least 1 for a model with fresh weights"
        method = _method(settings, model)
        before = trained_method(Path(model["checkpoint"])) if "checkpoint" in model else {}
        if before and before != canonical(method):
            named = ", ".join(name for choice in before.values() for name in choice)
            yield (
                "method",
                f"the checkpoint was trained with {named}: write that method, {written(before)}",
            )
        length = settings.sequence_length or around.data["sequence_length"]
        config = config_of(model)
        parent = config if "checkpoint" in model and not before else None
        yield from optimization_problems(method, config, length, parent)

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.platform.jobs.train",
            *TRAINING_SOURCES,
            *MODEL_SOURCES,
            *(CHECKPOINT_SOURCES if "checkpoint" in spec["model"] else ()),
            *axis_sources(method_of(spec["method"]), TRAIN_TIME),
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.cost import training

        return training(config_of(spec["model"]), spec)


def _model(settings: TrainSettings, around: Surroundings) -> Mapping[str, Any]:
    if settings.model is not None:
        return resolve_model(settings.model, around.data)
    if not around.model:
        raise ModelError("needs a model: write `model:` in the workflow or in this job")
    return around.model


def _method(settings: TrainSettings, model: Mapping[str, Any]) -> Method:
    """The method as the model has it: a checkpoint is converted to it."""
    return uptrained(settings.method) if "checkpoint" in model else settings.method


def optimization_spec(settings: Optimization, around: Surroundings) -> dict[str, Any]:
    """Return the part of a spec that train and uptrain share."""
    spec = {
        "method": canonical(settings.method),
        "sequence_length": settings.sequence_length or around.data["sequence_length"],
        "betas": list(settings.betas),
        "precision": _precision(settings.precision, around),
        "seed": around.seed,
    }
    same = set(Optimization.model_fields) - set(spec)
    return spec | {name: getattr(settings, name) for name in sorted(same)}


def _precision(written: str, around: Surroundings) -> str:
    """`auto` follows the device that is asked for, so that identities tell the two apart."""
    if written != "auto":
        return written
    return "bfloat16" if around.resources.gpus else "float32"


def optimization_problems(
    method: Method, config: DecoderConfig, length: int, parent: DecoderConfig | None
) -> Iterable[tuple[str, str]]:
    """Yield what does not fit between the method, the model's sizes and the sequence length.

    `parent`: where the model is converted, the sizes of the parent's own decoder.
    """
    yield from compatible(method, config, "method", parent=parent)
    span = method.span()
    if length % span or length < 2 * span:
        yield (
            f"method.{method['granularity'].value.name}",
            f"its block length must divide sequence_length ({length}) into two blocks or more, "
            f"found {span}",
        )
    yield from beyond_positions(length, config)
