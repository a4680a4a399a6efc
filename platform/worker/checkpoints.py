"""Checkpoints of one attempt: written at once, visible once their points are in the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from kvlab.platform import artifacts
from kvlab.platform.record import fault
from kvlab.platform.record.spool import SpoolWriter

_ASIDE = "tmp-"


class Checkpoints:
    """Writes folders aside and renames each to <attempt>-<step> after the acknowledgement.

    A background thread syncs and renames, so training goes on. Of several waiting checkpoints the
    oldest is kept, which will be visible soonest, and the newest. A visible one is removed when the
    record of a newer one was acknowledged: until then the store names it. An error of the thread is
    raised by the job's next call.
    """

    def __init__(self, folder: Path, attempt: int, spool: SpoolWriter) -> None:
        self._folder = folder
        self._attempt = attempt
        self._spool = spool
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Path, int]] = []  # step, folder, size of the spool then
        self._told: list[tuple[int, int]] = []  # step, size of the spool with its record
        self._acknowledged = 0
        self._error: OSError | None = None
        self._closed = False
        self._busy = False
        self._thread: threading.Thread | None = None

    @property
    def hungry(self) -> bool:
        """Whether an acknowledgement would make a checkpoint visible."""
        return bool(self._waiting)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write the checkpoint of `step`; return before it is visible.

        Raises:
            OSError: it cannot be written, or an earlier one could not be made visible.
        """
        self.raise_error()
        aside = self._folder / f"{_ASIDE}{self._attempt}-{step}"
        artifacts.remove(aside)
        aside.mkdir(parents=True)
        try:
            write(aside)
        except BaseException:
            artifacts.remove(aside)
            raise
        with self._changed:
            replaced = self._waiting.pop() if len(self._waiting) == 2 else None
            self._waiting.append((step, aside, self._spool.size))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._reveal, name="checkpoints", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        if replaced is not None and replaced[1] != aside:
            artifacts.remove(replaced[1])

    def acknowledge(self, offset: int) -> None:
        """Every record before `offset` of the spool is in the store."""
        with self._changed:
            self._acknowledged = max(self._acknowledged, offset)
            self._changed.notify_all()

    def settle(self, seconds: float) -> None:
        """Wait until no checkpoint is waiting, `seconds` at most."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._waiting or self._busy) or self._error is not None,
                seconds,
            )
        self.raise_error()

    def close(self) -> None:
        """Give up what is still waiting and end the thread."""
        with self._changed:
            self._closed = True
            given_up, self._waiting = self._waiting, []
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for _, aside, _ in given_up:
            artifacts.remove(aside)

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _due(self) -> bool:
        return (
            self._closed
            or (bool(self._waiting) and self._waiting[0][2] <= self._acknowledged)
            or (bool(self._told) and self._told[0][1] <= self._acknowledged)
        )

    def _reveal(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._due)
                if self._closed and not self._waiting:
                    return
                upto, self._busy = self._acknowledged, True
                ready = bool(self._waiting) and self._waiting[0][2] <= upto
                step, aside, _ = self._waiting.pop(0) if ready else (0, None, 0)
            try:
                if aside is not None:
                    self._rename(step, aside)
                self._remove_older(upto)
            except OSError as error:
                self._error = error
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _rename(self, step: int, aside: Path) -> None:
        fault.point("checkpoint.before_rename")
        target = self._folder / f"{self._attempt}-{step}"
        artifacts.move(aside, target)
        fault.point("checkpoint.after_rename")
        self._spool.checkpoint(step, str(target))
        self._told.append((step, self._spool.size))
        artifacts.remove(aside)

    def _remove_older(self, acknowledged: int) -> None:
        """Remove what came before the newest checkpoint that the store names."""
        known = [step for step, size in self._told if size <= acknowledged]
        if not known:
            return
        self._told = self._told[len(known) :]
        for older, path in _visible(self._folder):
            # A later attempt's are not ours to remove, should this one be superseded.
            if older < (self._attempt, known[-1]):
                artifacts.remove(path)


def newest(folder: Path, attempt: int) -> tuple[int, str] | None:
    """Return the newest checkpoint (step, folder) that `attempt` made visible, or None.

    It counts although its record may be missing: it was renamed after all its points were stored.
    """
    own = [(step, str(path)) for (number, step), path in _visible(folder) if number == attempt]
    return max(own, default=None)


def sweep(folder: Path, attempt: int, keep: Path | None) -> None:
    """Remove what attempts before `attempt` left, except the checkpoint it continues from."""
    if not folder.is_dir():
        return
    for one in folder.glob(f"{_ASIDE}*"):
        artifacts.remove(one)
    for (number, _), path in _visible(folder):
        if number < attempt and path != keep:
            artifacts.remove(path)


def _visible(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Checkpoints as ((attempt, step), path)."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        attempt, _, step = path.name.partition("-")
        if attempt.isdigit() and step.isdigit():
            found.append(((int(attempt), int(step)), path))
    return found
