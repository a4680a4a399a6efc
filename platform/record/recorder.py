"""From spools to SQL: what was read of each attempt, and up to where it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlab.db.batches import Batch
from kvlab.platform.record.spool import read_file, records

Row = tuple[str, int, float, int]


@dataclass(slots=True)
class Tail:
    """One attempt's spool.

    Attributes:
        offset: everything before it has been read. acknowledged: and is committed.
        checkpoint: the newest visible checkpoint it told of (step, folder).
        end: its end record, once read.
    """

    job: int
    attempt: int
    offset: int = 0
    acknowledged: int = 0
    checkpoint: tuple[int, str] | None = None
    end: dict[str, Any] | None = None
    _rows: list[Row] = field(default_factory=list)
    _revealed: list[tuple[int, str]] = field(default_factory=list)

    def take(self, offset: int, data: bytes) -> None:
        """Read a piece of the spool; what was read before is skipped, a gap is not read."""
        if offset > self.offset:
            return
        found, size = records(data[self.offset - offset :])
        self.offset += size
        for kind, *rest in found:
            if kind == "p":
                step, time_ms, metrics = rest
                self._rows += [(key, step, value, time_ms) for key, value in metrics.items()]
            elif kind == "c":
                self.reveal(rest[0], rest[1])
            else:
                self.end = rest[0]

    def take_file(self, path: Path) -> None:
        """Read the rest of the spool from its file: its worker is gone."""
        while data := read_file(path, self.offset):
            before = self.offset
            self.take(before, data)
            if self.offset == before:
                return

    def reveal(self, step: int, folder: str) -> None:
        """A checkpoint is visible."""
        self.checkpoint = (step, folder)
        self._revealed.append(self.checkpoint)

    def write(self, batch: Batch) -> int:
        """Put what was read since the last time into a batch; return the number of points."""
        points = 0
        if self._rows:
            points = batch.points(self.job, self.attempt, self._rows)
        for step, folder in self._revealed:
            batch.checkpoint(self.job, self.attempt, step, folder)
        return points

    @property
    def news(self) -> bool:
        """Whether `write` has something to put, or committing has something to acknowledge."""
        return bool(self._rows or self._revealed)

    def committed(self) -> None:
        """The batch was committed."""
        self.acknowledged = self.offset
        self._rows.clear()
        self._revealed.clear()
