"""What a user writes under `controller:`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvlab.platform.jobs.kind import Kind, Parent, Prediction, References, Settings, Surroundings
from kvlab.platform.jobs.model import MODEL_SOURCES, lineage, method_of
from kvlab.platform.jobs.reference import One


class ControllerSettings(Settings):
    """`controller:` trains ADORE's controller to tell the labels of a label job."""

    of: One
    labels: One
    state: Literal["gru", "token"] = "gru"
    hidden: int = Field(default=64, ge=1, le=4096)
    position: Literal["relative", "absolute", "none"] = "relative"
    match: int = Field(default=32, ge=0, le=4096)
    epochs: int = Field(default=8, ge=1, le=10_000)
    batch_size: int = Field(default=8, ge=1, le=65536)
    queries: int = Field(default=64, ge=1, le=32768)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)


def scored_layers(labels: Parent) -> int:
    """KV layers that a label job labelled, each for itself; 1: all together."""
    if labels.spec["per"] == "model":
        return 1
    config, trained = lineage(labels.parents["of"])
    return len(method_of(trained).acting(config).kv_layers)


class Controller(Kind):
    """Train a controller; later jobs release and rebuild by it: `apply: {adore: {}}`."""

    name = "controller"
    settings = ControllerSettings
    references: ClassVar[References] = {"of": "one", "labels": "one"}
    reference_kinds: ClassVar[Mapping[str, str]] = {"labels": "label"}

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        assert isinstance(settings, ControllerSettings)
        return {**settings.model_dump(exclude={"of", "labels"}), "seed": around.seed}

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        labels = around.parents.get("labels")
        if labels is None or labels.kind != "label":
            return
        own, _ = lineage(around.parents["of"])
        other, _ = lineage(labels.parents["of"])
        if (own.vocab_size, own.width) != (other.vocab_size, other.width):
            yield (
                "of",
                f"must have the vocabulary and width of what '{labels.name}' labelled "
                f"({other.vocab_size} and {other.width}), found {own.vocab_size} and {own.width}",
            )

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            "kvlab.methods.eviction.adore.controller",
            "kvlab.methods.eviction.adore.sizes",
            "kvlab.platform.jobs.controller.run",
            "kvlab.platform.jobs.label.recall",
            *MODEL_SOURCES,
        )

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        from kvlab.methods.eviction.adore.sizes import ControllerConfig

        config, _ = lineage(parents["of"])
        labels = parents["labels"].spec
        sizes = ControllerConfig(
            config.vocab_size, config.width, spec["state"], spec["hidden"], spec["position"],
            spec["match"], scored_layers(parents["labels"]),
        )  # fmt: skip
        rows = labels["samples"] * labels["sequence_length"] * spec["epochs"]
        queries = min(spec["queries"], labels["sequence_length"])
        pairs = labels["samples"] * spec["epochs"] * queries * labels["sequence_length"]
        each = 2 * sizes.layers * (sizes.hidden + sizes.match)
        return Prediction(
            parameters=sizes.parameters, flops=3.0 * (2 * rows * sizes.parameters + each * pairs)
        )
