"""How a workflow stands at one instant, small enough for a live view to ask for often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvlab.db.states import JobState

if TYPE_CHECKING:
    from kvlab.platform.search.study import StudyView


@dataclass(frozen=True, slots=True)
class Change:
    """A job began, ended, was skipped or goes again.

    Attributes:
        cause, message: why its attempt ended; None where none did.
        seconds: how long the attempt took. reused: done with another workflow's result.
        note: what else is to be said, where it goes on.
    """

    name: str
    state: JobState
    attempt: int
    cause: str | None = None
    message: str | None = None
    seconds: float | None = None
    reused: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class RunningJob:
    """progress: (done, total, note), or None before the job said anything."""

    name: str
    attempt: int
    since: float
    progress: tuple[float, float, str] | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """counts: jobs per state. changes: in their order, from the number that was asked for."""

    workflow: int
    counts: Mapping[JobState, int]
    running: tuple[RunningJob, ...]
    changes: tuple[Change, ...]
    studies: tuple[StudyView, ...] = ()
