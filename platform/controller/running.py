"""A running attempt as its controller sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlab.db.states import Cause
from kvlab.platform.record.recorder import Tail
from kvlab.platform.worker.message import Key

POLL_SECONDS = 0.2
POLLS_PER_SECOND = 200
"""Of all running attempts together: with many, each is asked less often."""

GANG_SECONDS = 2.0
"""How long the ranks of a failing gang have to say why, before one is believed."""

WAITED = "it waited behind a job that took long or ended its worker"
"""Why an attempt ended that its worker had not begun: nothing happened to the job."""

_TELLING = (
    Cause.OUT_OF_MEMORY,
    Cause.INFRASTRUCTURE,
    Cause.DIVERGED,
    Cause.NODE_LOST,
    Cause.USER_ERROR,
    Cause.STOPPED,
)
"""When ranks disagree, the first of these that one of them names: the rest is its echo."""

End = Mapping[str, Any]
"""An end record: cause, and message, result, artifact where there are any."""


@dataclass(slots=True)
class Running:
    """One attempt on one slot.

    Attributes:
        slot: None when its workers are gone.
        since: when it began. kept: up to when its work is safe in a checkpoint.
        ends: rank -> end record. failing: when the first rank failed.
    """

    tail: Tail
    slot: int | None
    workers: int
    since: float
    kept: float
    poll_at: float
    ends: dict[int, End] = field(default_factory=dict)
    failing: float | None = None
    progress: tuple[float, float, str] | None = None
    asked: bool = False  # to stop
    waits: bool = False  # behind another attempt of its slot

    @property
    def key(self) -> Key:
        return (self.tail.job, self.tail.attempt)

    def rank_ended(self, rank: int, end: End, now: float) -> None:
        """A rank reported its end, or was lost."""
        self.ends.setdefault(rank, end)
        if self.failing is None and Cause(end["cause"]) is not Cause.DONE:
            self.failing = now

    def end(self, now: float) -> End | None:
        """Return how the attempt ended, or None while that is open."""
        patient = self.failing is None or now < self.failing + GANG_SECONDS
        if len(self.ends) < self.workers and patient:
            return None
        if self.failing is None:
            return self.ends[0]
        bad = [end for end in self.ends.values() if Cause(end["cause"]) is not Cause.DONE]
        return min(bad, key=lambda end: _TELLING.index(Cause(end["cause"])))

    def lost(self, now: float) -> float:
        """Seconds of work that are gone if it ends now."""
        return max(0.0, now - max(self.since, self.kept))
