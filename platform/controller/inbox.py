"""What a controller hears of: from its workers, its heartbeat and its operator."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from kvlab.platform.worker.message import Hello, Key, Report


@dataclass(frozen=True, slots=True)
class Up:
    """All workers of a slot answered."""

    slot: int
    hellos: tuple[Hello, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """A worker reported. `ran`: it is the answer to `run`, not to a poll."""

    slot: int
    report: Report
    ran: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is dead or cannot be made. `memory`: Ray killed it for memory."""

    slot: int
    reason: str
    memory: bool = False


@dataclass(frozen=True, slots=True)
class TakenBack:
    """An attempt that was given to a slot too early has not begun and will not."""

    slot: int
    key: Key


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody asks for something: "stop", "kill" or "cancel"."""

    what: str


@dataclass(frozen=True, slots=True)
class LeaseOver:
    """The heartbeat could not keep the lease."""

    error: Exception


Message = Up | Told | Lost | TakenBack | Asked | LeaseOver


class Inbox:
    """A queue that any thread, callback or signal handler may put into."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def put(self, message: Message) -> None:
        self._queue.put(message)

    def get(self, seconds: float) -> list[Message]:
        """Return all messages there are, waiting `seconds` at most for the first."""
        found: list[Message] = []
        try:
            found.append(self._queue.get(block=seconds > 0, timeout=seconds or None))
            while True:
                found.append(self._queue.get_nowait())
        except queue.Empty:
            return found
