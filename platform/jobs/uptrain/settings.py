"""What a user writes under `uptrain:`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from kvlab.methods.axis import TRAIN_TIME
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.method import axis_sources, canonical, uptrained
from kvlab.platform.jobs.model import MODEL_SOURCES, lineage, method_of
from kvlab.platform.jobs.reference import One
from kvlab.platform.jobs.train.settings import (
    INCIDENTAL,
    TRAINING_SOURCES,
    Optimization,
    optimization_problems,
    optimization_spec,
)


class Lora(Settings):
    """Train low-rank additions instead of the weights; they are merged when the job ends.

    Attributes:
        quantize: hold the maps that get them in 4 bits meanwhile (QLoRA).
    """

    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    quantize: Literal["nf4", "fp4"] | None = None


class Distill(Settings):
    """Learn from another job's model beside the text."""

    from_: One = Field(alias="from")
    weight: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, le=100)


class Sparse(Settings):
    """Read no more than the tokens that the parent attends to most (ADORE's fine-tuning)."""

    top: int = Field(default=96, ge=1, le=4096)
    aggregate: Literal["mean", "max"] = "mean"


class UptrainSettings(Optimization):
    """`uptrain:` converts another job's model to a method and trains it on."""

    from_: One = Field(alias="from")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    lora: Lora | None = None
    distill: Distill | None = None
    sparse: Sparse | None = None


class Uptrain(Kind):
    """Convert a model to a method and go on training it."""

    name = "uptrain"
    settings = UptrainSettings
    references: ClassVar[References] = {"from": "one", "teacher": "one"}
    reference_paths: ClassVar[Mapping[str, str]] = {"teacher": "distill.from"}
    needs_data = True
    produces_model = True
    gang = True
    incidental = INCIDENTAL

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, UptrainSettings)
        distill, lora = settings.distill, settings.lora
        sparse = {} if settings.sparse is None else {"sparse": settings.sparse.model_dump()}
        return {
            **sparse,
            **optimization_spec(settings, around),
            "method": canonical(uptrained(settings.method)),
            "stage": _stage(around.parents["from"]),
            "lora": lora and lora.model_dump(mode="json"),
            "distill": distill and distill.model_dump(exclude={"from_"}),
        }

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, UptrainSettings)
        config, before = lineage(around.parents["from"])
        wanted = canonical(uptrained(settings.method))
        length = settings.sequence_length or around.data["sequence_length"]
        parent = method_of(before).acting(config) if before != wanted else None
        yield from optimization_problems(uptrained(settings.method), config, length, parent)
        if "granularity" in before and before != wanted:
            yield (
                "from",
                f"'{around.parents['from'].name}' is already converted "
                f"({', '.join(name for choice in before.values() for name in choice)}); "
                "name a job with full attention, or keep its method",
            )
        if settings.lora and settings.lora.quantize and settings.parallel == "fsdp":
            yield "lora.quantize", "cannot go with parallel: fsdp, which shards weights: use ddp"
        if settings.sparse is not None:
            yield from _sparse_problems(settings, wanted, length)
        if "teacher" in around.parents:
            taught, _ = lineage(around.parents["teacher"])
            if taught.vocab_size != config.vocab_size:
                yield (
                    "distill.from",
                    f"the teacher's vocabulary ({taught.vocab_size}) must equal the model's "
                    f"({config.vocab_size})",
                )

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.platform.jobs.uptrain",
            "kvlab.methods.sharing.convert",
            *(("kvlab.methods.eviction.adore.labels",) if "sparse" in spec else ()),
            *TRAINING_SOURCES,
            *MODEL_SOURCES,
            *axis_sources(method_of(spec["method"]), TRAIN_TIME),
        )

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        if not spec["lora"]:
            return ()
        return ("peft", "bitsandbytes") if spec["lora"]["quantize"] else ("peft",)

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.cost import training

        config, _ = lineage(parents["from"])
        if not spec["distill"] and "sparse" not in spec:
            return training(config, spec)
        return training(config, spec, lineage(parents.get("teacher", parents["from"])))


def _sparse_problems(
    settings: UptrainSettings, wanted: Mapping[str, Any], length: int
) -> Iterator[tuple[str, str]]:
    assert settings.sparse is not None
    if settings.distill is not None:
        yield "sparse", "cannot go with distill: leave one of the two out"
    if wanted:
        yield (
            "sparse",
            f"marks what full attention attends to, and the method is {settings.method.label}: "
            "use method: full_attention",
        )
    if settings.sparse.top >= length:
        yield (
            "sparse.top",
            f"must be below the {length} tokens of a text, found {settings.sparse.top}: "
            "else every token is read",
        )


def _stage(parent: Parent) -> int:
    """How many jobs trained the model before: each stage reads its text in an order of its own."""
    return 1 + (_stage(parent.parents["from"]) if "from" in parent.parents else 0)
