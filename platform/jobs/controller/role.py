"""A trained controller, where a later job's `apply` needs one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvlab.methods.axis import Method
from kvlab.platform.jobs.controller.settings import scored_layers
from kvlab.platform.jobs.kind import Parent, Surroundings
from kvlab.platform.jobs.model import lineage, method_of

ROLE = "controller"
"""The field, role, spec's key and job kind, and the eviction's parameter that it fills in."""


def problems(apply: Method, around: Surroundings) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where a job's `apply` and its controller do not go together."""
    parent, eviction = around.parents.get(ROLE), apply["eviction"]
    name = eviction.value.name
    if getattr(eviction.params, ROLE, ""):
        yield (
            f"apply.{name}.{ROLE}",
            f"is filled in by a job: name one beside apply ({ROLE}: JOB), and leave this out",
        )
    elif parent is None and apply.lacks() == ROLE:
        yield (
            "apply",
            f"'{name}' needs a trained controller: name the job that trains one beside apply "
            f"({ROLE}: JOB), or choose scores: rule",
        )
    elif parent is not None and apply.lacks() != ROLE:
        yield (
            ROLE,
            f"would change nothing: '{name}' as applied asks no controller; leave it out",
        )
    elif parent is not None and parent.kind == ROLE:
        own, other = lineage(around.parents["of"])[0], lineage(parent.parents["of"])[0]
        if (own.vocab_size, own.width) != (other.vocab_size, other.width):
            yield (
                ROLE,
                f"'{parent.name}' was trained on a model with vocab_size {other.vocab_size} and "
                f"width {other.width}, '{around.parents['of'].name}' has {own.vocab_size} and "
                f"{own.width}",
            )
        labels = parent.parents.get("labels")
        if labels is not None and labels.kind == "label":
            yield from _other_layers(apply, parent.name, labels, around.parents["of"])


def _other_layers(
    apply: Method, name: str, labels: Parent, of: Parent
) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where a controller scores other layers than `apply` asks for."""
    eviction = apply["eviction"]
    per, wanted = labels.spec["per"], getattr(eviction.params, "per", "model")
    if per != wanted:
        yield (
            f"apply.{eviction.value.name}.per",
            f"is '{wanted}', and '{name}' learned from labels per {per}: write per: {per}, or "
            f"label with per: {wanted}",
        )
    elif per == "layer":
        config, trained = lineage(of)
        own, other = len(method_of(trained).acting(config).kv_layers), scored_layers(labels)
        if own != other:
            yield ROLE, f"'{name}' scores for {other} KV layers, '{of.name}' has {own}"


def sources(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that decide a result where `spec` takes a controller."""
    return ("kvlab.platform.jobs.controller.supply",) if spec.get(ROLE) else ()
