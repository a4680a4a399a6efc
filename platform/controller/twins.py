"""Jobs of one identity: the first that is ready does the work, the others wait for its result."""

from __future__ import annotations

from collections import deque


class Twins:
    """Who does the work of each identity, and who waits for it; every call is O(1).

    Jobs of the identity "" have no twins.
    """

    def __init__(self) -> None:
        self._leads: dict[str, int] = {}
        self._behind: dict[str, deque[int]] = {}

    def claim(self, identity: str, job: int) -> int:
        """Who does the work, or did it: `job` where nobody else does."""
        return self._leads.setdefault(identity, job) if identity else job

    def leads(self, identity: str, job: int) -> bool:
        """Whether it is this job that does the work."""
        return not identity or self._leads.get(identity) == job

    def wait(self, identity: str, job: int) -> None:
        """The job waits for the one that does the work."""
        self._behind.setdefault(identity, deque()).append(job)

    def hand_over(self, identity: str, job: int) -> None:
        """The job does the work from now on."""
        self._leads[identity] = job

    def give_up(self, identity: str) -> None:
        """Nobody does the work any more."""
        self._leads.pop(identity, None)

    def next(self, identity: str) -> int | None:
        """Remove and return the job that has waited longest; None: nobody waits."""
        behind = self._behind.get(identity)
        if not behind:
            self._behind.pop(identity, None)
            return None
        return behind.popleft()

    def clear(self) -> None:
        """Forget everything: nothing begins any more."""
        self._leads.clear()
        self._behind.clear()
