"""What a job that uses a model may take from jobs that prepared for it: budgets, a controller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvlab.methods.axis import Method
from kvlab.platform.jobs.calibrate import budgets
from kvlab.platform.jobs.controller import role as controller
from kvlab.platform.jobs.kind import References, Settings, Surroundings

KINDS: Mapping[str, str] = {budgets.ROLE: "calibrate", controller.ROLE: "controller"}
"""The field and role by which it is named -> the kind of job that gives it."""
REFERENCES: References = dict.fromkeys(KINDS, "one")


def spec_of(settings: Settings) -> dict[str, bool]:
    """The spec's keys for what is taken; nothing for what is not."""
    return {role: True for role in KINDS if getattr(settings, role) is not None}


def problems(apply: Method, around: Surroundings) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where a job's `apply` cannot take what it refers to."""
    yield from budgets.problems(apply, around)
    yield from controller.problems(apply, around)


def sources(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that decide a result by what `spec` takes."""
    own = "kvlab.platform.jobs.prepared"
    return (own, *budgets.sources(spec), *controller.sources(spec))
