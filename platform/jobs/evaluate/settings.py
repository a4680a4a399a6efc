"""What a user writes under `evaluate:`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import resolve
from kvlab.platform.jobs import given
from kvlab.platform.jobs.cost import OF_QUESTIONS, OF_WINDOWS
from kvlab.platform.jobs.dtype import Dtype, dtype_of
from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.method import MethodField, axis_sources, canonical, compatible, short_of
from kvlab.platform.jobs.model import MODEL_SOURCES, beyond_positions, lineage, method_of
from kvlab.platform.jobs.quantities import Count
from kvlab.platform.jobs.reference import Many, One
from kvlab.platform.jobs.served import SERVER_SOURCES, distribution, unserved

Metric = Literal["perplexity", "loss_by_position", "divergence", "recall", "multi_turn"]
Task = Literal["passkey", "associative_recall"]
Depth = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[int, Field(ge=8, le=2**20)]


class RecallSettings(Settings):
    """`recall:` the questions of the metrics recall and multi_turn."""

    tasks: Annotated[tuple[Task, ...], Field(strict=False, min_length=1)] = (
        "passkey",
        "associative_recall",
    )
    lengths: Annotated[tuple[Length, ...], Field(strict=False, min_length=1)] | None = None
    depths: Annotated[tuple[Depth, ...], Field(strict=False, min_length=1)] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    pairs: int = Field(default=8, ge=2, le=65536)
    answer: int = Field(default=3, ge=1, le=64)
    samples: int = Field(default=20, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class EvaluateSettings(Settings):
    """`evaluate:` measures models on held-out text and on questions, all arms on the same."""

    of: Many
    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = ("perplexity",)
    apply: Annotated[Method, MethodField("run")] = Field(default_factory=lambda: resolve({}))
    budgets: One | None = None
    controller: One | None = None
    sequence_length: int | None = Field(default=None, ge=2, le=2**20)
    tokens: Count = Field(default=100_000, ge=1)
    prompt: int | None = Field(default=None, ge=1, le=2**20)
    generate: int | None = Field(default=None, ge=1, le=2**20)
    recall: RecallSettings | None = None
    batch_size: int = Field(default=16, ge=1, le=65536)
    dtype: Dtype = "auto"
    engine: Literal["torch", "vllm"] = "torch"


class Evaluate(Kind):
    """Score a model on held-out tokens that every arm of the job predicts."""

    name = "evaluate"
    settings = EvaluateSettings
    references: ClassVar[References] = {"of": "many", **given.REFERENCES}
    reference_kinds = given.KINDS
    needs_data = True

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, EvaluateSettings)
        length = settings.sequence_length or around.data["sequence_length"]
        spec = {
            "metrics": list(settings.metrics),
            "apply": canonical(settings.apply),
            "sequence_length": length,
            "tokens": settings.tokens,
            "batch_size": settings.batch_size,
            "first_target": _first_target(around),
            "dtype": dtype_of(settings.dtype, around),
            "seed": around.seed,
        }
        spec |= given.spec_of(settings)
        if settings.engine != "torch":
            spec["engine"] = settings.engine
        if "divergence" in settings.metrics:
            prompt = settings.prompt or length // 2
            generate = settings.generate or length - prompt
            spec["divergence"] = {"prompt": prompt, "generate": generate}
        if asks(settings):
            recall = _recall(settings, length)
            spec["recall"] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in recall.model_dump().items()
            }
        return spec

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        assert isinstance(settings, EvaluateSettings)
        config, trained = lineage(around.parents["of"])
        length = settings.sequence_length or around.data["sequence_length"]
        made = method_of(trained)
        yield from compatible(settings.apply, config, "apply", trained=made)
        yield from short_of(settings.apply, made, _shortest(settings, length), "apply")
        yield from given.problems(settings.apply, around)
        yield from _uncut(settings)
        if settings.engine == "vllm":
            yield from unserved(settings.apply, around.parents["of"])
            if set(settings.metrics) != {"recall"}:
                yield "engine", "vllm answers questions: give metrics: [recall] alone"
        span = made.span()
        if length % span or length < 2 * span:
            yield (
                "sequence_length",
                f"must be two or more blocks of '{around.parents['of'].name}', whose block length "
                f"is {span}, found {length}",
            )
        yield from beyond_positions(length, config)
        yield from _misplaced(settings)
        if "divergence" in settings.metrics:
            yield from _prompt_problems(settings, length, _first_target(around), config)
        if asks(settings):
            yield from _recall_problems(_recall(settings, length), around.data, config)

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (distribution(),) if spec.get("engine") == "vllm" else ()

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            *(SERVER_SOURCES if spec.get("engine") == "vllm" else ()),
            "kvlab.platform.data.corpus",
            "kvlab.platform.jobs.dtype",
            "kvlab.platform.jobs.evaluate",
            *MODEL_SOURCES,
            *axis_sources(method_of(spec["apply"])),
            *given.sources(spec),
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.platform.jobs.cost import scoring

        return scoring(*lineage(parents["of"]), spec)


def asks(settings: EvaluateSettings) -> bool:
    """Whether it asks questions."""
    return not OF_QUESTIONS.isdisjoint(settings.metrics)


def _recall(settings: EvaluateSettings, length: int) -> RecallSettings:
    """The questions as they are asked: by default at half the window and at all of it."""
    written = settings.recall or RecallSettings()
    return written.model_copy(update={"lengths": written.lengths or (max(8, length // 2), length)})


def _shortest(settings: EvaluateSettings, length: int) -> int:
    """The least text that a budget's share is of: a window, a prompt or a context."""
    texts = [] if OF_WINDOWS.isdisjoint(settings.metrics) else [length]
    if "divergence" in settings.metrics:
        texts.append(settings.prompt or length // 2)
    if asks(settings):
        texts += _recall(settings, length).lengths or ()
    return min(texts)


def _first_target(around: Surroundings) -> int:
    from kvlab.platform.jobs.cost import first_target

    arms = around.siblings.get("of") or (around.parents["of"],)
    return max(first_target(*lineage(arm)) for arm in arms)


def _uncut(settings: EvaluateSettings) -> Iterator[tuple[str, str]]:
    """A metric without a prompt, of a cache that a prompt alone cuts or divides: it says nothing.

    A budget that is divided anew while it generates goes by what it has read since.
    """
    eviction, budget = settings.apply["eviction"], settings.apply["budget"]
    grows = eviction.value.grows is not None and eviction.value.grows(eviction.params)
    once = budget.value.observes_all and getattr(budget.params, "refresh", None) is None
    asked = [metric for metric in settings.metrics if metric in OF_WINDOWS]
    if grows and asked:
        yield (
            "metrics",
            f"{asked[0]} reads a window from its first token on, and {eviction.value.name} as "
            "applied keeps all that comes after a prompt: nothing would be cut; ask for divergence",
        )
    elif once and asked:
        yield (
            "metrics",
            f"{asked[0]} reads a window from its first token on, and {budget.value.name} divides "
            "by what a prompt shows: one token shows nothing; ask for divergence "
            "(metrics: [divergence])",
        )


def _misplaced(settings: EvaluateSettings) -> Iterator[tuple[str, str]]:
    """Settings of a metric that is not asked for."""
    for name in ("prompt", "generate"):
        if getattr(settings, name) is not None and "divergence" not in settings.metrics:
            yield name, "belongs to the metric divergence: add it to metrics, or leave this out"
    if settings.recall is not None and not asks(settings):
        yield (
            "recall",
            "belongs to the metrics recall and multi_turn: add one to metrics, or leave this out",
        )


def _prompt_problems(
    settings: EvaluateSettings, length: int, first: int, config: DecoderConfig
) -> Iterator[tuple[str, str]]:
    prompt = settings.prompt or length // 2
    if not first <= prompt < length:
        yield (
            "prompt",
            f"must be from {first} to {length - 1}, so that targets of the window of {length} "
            f"tokens follow it, found {prompt}",
        )
    elif settings.generate is not None and prompt + settings.generate > config.max_positions:
        yield (
            "generate",
            f"the prompt of {prompt} and what is generated must stay within the model's "
            f"max_positions ({config.max_positions}), found {settings.generate}",
        )


def _recall_problems(
    recall: RecallSettings, data: Mapping[str, Any], config: DecoderConfig
) -> Iterator[tuple[str, str]]:
    from kvlab.platform.jobs.evaluate.english import THINGS

    source = data.get("source") or {}
    symbols = source.get("kind") == "recall"
    pairs = recall.pairs if "associative_recall" in recall.tasks else 1
    most = len(THINGS)
    if symbols:
        most = min(source["keys"], source["values"] // recall.answer)
    if pairs > most:
        having = f"with answers of {recall.answer} words " if symbols else ""
        yield "recall.pairs", f"must be at most {most} {having}for these data, found {pairs}"
    taken = pairs * (1 + recall.answer) + 1
    for number, length in enumerate(recall.lengths or ()):
        if length > config.max_positions:
            yield (
                f"recall.lengths.{number}",
                f"must be at most the model's max_positions ({config.max_positions}), "
                f"found {length}",
            )
        elif symbols and length < taken:
            yield (
                f"recall.lengths.{number}",
                f"{pairs} facts and a question take {taken} tokens, found {length}: give longer "
                "lengths or fewer pairs",
            )
