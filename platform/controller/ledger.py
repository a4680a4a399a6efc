"""What a controller has decided and not stored yet: one commit for all of it, then the deeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvlab.db.batches import Batch
from kvlab.db.errors import LeaseLost, StoreError
from kvlab.db.rows import Lease
from kvlab.db.store import Store
from kvlab.platform.record import fault
from kvlab.platform.record.recorder import Tail

Row = Callable[[Batch], Any]
PATIENCE_SECONDS = 120.0
"""How long an unreachable database may stay so before the controller gives up."""


class Ledger:
    """Gathers rows and the deeds that they allow. `commit` stores the rows, then does the deeds.

    Points and checkpoints come first: ends that were read from the same spools refer to them.
    """

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._tails: dict[int, Tail] = {}
        self._rows: list[Row] = []
        self._jobs: dict[int, None] = {}
        self._deeds: list[Callable[[], Any]] = []
        self._stages: set[str] = set()

    def record(self, tail: Tail) -> None:
        """Store what the tail has read."""
        self._tails[tail.job] = tail
        self._stages.add("record")

    def row(self, row: Row, job: int | None = None, stage: str | None = None) -> None:
        """Store a change of `job`. `stage` names its fault points: "start" or "end"."""
        self._rows.append(row)
        if job is not None:
            self._jobs[job] = None
        if stage is not None:
            self._stages.add(stage)

    def then(self, deed: Callable[[], Any]) -> None:
        """Do this once all that was gathered so far is stored."""
        self._deeds.append(deed)

    @property
    def waiting(self) -> bool:
        """Whether there is something to store: deeds of the last commit had rows of their own."""
        return bool(self._rows or self._tails)

    def commit(self, now: float) -> None:
        """Store everything in one transaction, then act.

        Raises:
            LeaseLost: another controller has the workflow; nothing was stored or done.
            StoreError: the database stayed unreachable.
        """
        if self._tails or self._rows:
            for stage in self._stages:
                fault.point(f"{stage}.before_commit")
            self._write(now)
            for stage in self._stages:
                fault.point(f"{stage}.after_commit")
            for tail in self._tails.values():
                tail.committed()
        deeds, self._deeds = self._deeds, []
        self._tails.clear()
        self._rows.clear()
        self._jobs.clear()
        self._stages.clear()
        for deed in deeds:
            deed()

    def _write(self, now: float) -> None:
        give_up = time.monotonic() + PATIENCE_SECONDS
        pause = 0.1
        unanswered: str | None = None
        while True:
            batch = None
            try:
                # Storing twice what arrived although nobody said so would be an illegal move.
                if unanswered is not None and self._store.committed(unanswered):
                    return
                with self._store.batch(self._lease, now) as batch:
                    batch.expect([*self._jobs])
                    for tail in self._tails.values():
                        tail.write(batch)
                    for row in self._rows:
                        row(batch)
                return
            except LeaseLost:
                raise
            except StoreError:
                if time.monotonic() > give_up:
                    raise
                if batch is not None:
                    unanswered = batch.transaction
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
