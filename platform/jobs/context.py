"""What a running job is given, and the errors by which it says how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from kvlab import KvlabError


class JobError(KvlabError):
    """The job cannot be done as asked (cause `user_error`): never retried."""


class Diverged(KvlabError):
    """The loss is NaN or infinite (cause `diverged`)."""


class Stopped(BaseException):
    """Raised at a safe point after `context.stopping()` became true. Not an error."""


class Context(Protocol):
    """A job's only door to the outside. Jobs never open the database, Ray or MLflow.

    Attributes:
        folder: an empty folder; its files are published as the job's artifacts when it returns.
        inputs: role -> published folder of that parent (read only).
        device: "cpu" or "cuda:0". threads: torch threads the job may use.
        rank, workers: this process's place in the gang (0 of 1 for ordinary jobs). Only rank 0
            logs, checkpoints and publishes; torch.distributed is initialised by the job when
            workers > 1 from `rendezvous` ("tcp://host:port").
    """

    inputs: Mapping[str, Path]
    device: str
    threads: int
    rank: int
    workers: int
    rendezvous: str | None

    @property
    def folder(self) -> Path: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Report points; returns at once (50 microseconds or less).

        A later one of the same key and step in one attempt replaces the earlier.
        """

    def progress(self, done: float, total: float, note: str = "") -> None:
        """Say how far the job is (tokens, repeats), for the live view only."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a checkpoint with `write(folder)`. Does not wait for the acknowledgement.

        It becomes visible (atomic rename) only after every point logged up to `step` was
        acknowledged. Only the newest is kept.
        """

    def restore(self) -> tuple[int, Path] | None:
        """The newest visible checkpoint of this job's identity: (step, folder), or None."""

    def stopping(self) -> bool:
        """True once the job should checkpoint and raise `Stopped`."""
