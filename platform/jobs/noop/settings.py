"""A job that does nothing but what it is told: for benches and fault tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kvlab.platform.jobs.kind import Kind, Settings, Surroundings


class NoopSettings(Settings):
    """Log `points` over `sleep` seconds, checkpoint, and return, or `fail` as named.

    `checkpoints` counts the points between two of them (0: none); `fail_at` is the number of points
    after which it fails (null: all).
    """

    sleep: float = Field(default=0.0, ge=0)
    points: int = Field(default=0, ge=0)
    checkpoints: int = Field(default=0, ge=0)
    fail: Literal["nan", "oom", "user", "disk", "exit"] | None = None
    fail_at: int | None = Field(default=None, ge=0)


class Noop(Kind):
    """Nothing, on purpose."""

    name = "noop"
    settings = NoopSettings

    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        return {**settings.model_dump(), "seed": around.seed}

    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        return ("kvlab.platform.jobs.noop",)
