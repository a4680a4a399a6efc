"""A job that does nothing but what it is told: for benches and fault tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kvlab.platform.jobs.kind import Kind, Settings, Surroundings


class NoopSettings(Settings):
    """`sleep` seconds, log `points`, then return, or `fail` in the way that is named."""

    sleep: float = Field(default=0.0, ge=0)
    points: int = Field(default=0, ge=0)
    fail: Literal["nan", "oom", "error", "crash"] | None = None


class Noop(Kind):
    """Nothing, on purpose."""

    name = "noop"
    settings = NoopSettings

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        return {**settings.model_dump(), "seed": around.seed}

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return ("kvlab.platform.jobs.noop",)
