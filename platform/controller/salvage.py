"""What a worker that is gone left on the disk."""

from __future__ import annotations

from pathlib import Path

from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.home import Home
from kvlab.platform.record.recorder import Tail
from kvlab.platform.worker.checkpoints import newest


def salvage(home: Home, identity: str, tail: Tail) -> float | None:
    """Read the rest of an attempt's spool, and a checkpoint that it did not come to tell of.

    Returns:
        when its newest visible checkpoint was made, None without one.
    """
    tail.take_file(home.spool(tail.job, tail.attempt))
    untold = newest(home.checkpoints(identity, tail.job), tail.attempt)
    if untold is not None and (tail.checkpoint is None or untold > tail.checkpoint):
        tail.reveal(*untold)
    return None if tail.checkpoint is None else modified(Path(tail.checkpoint[1]))


def last_sign(home: Home, tail: Tail, began: float) -> float:
    """When the attempt last wrote something."""
    return modified(home.spool(tail.job, tail.attempt)) or began


def modified(path: Path) -> float | None:
    """When a file or folder last changed, None when it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


Checkpoint = tuple[int, str]
"""(step, folder)."""


def restore_point(
    home: Home, jobs: Jobs, job: int, attempt: int
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """Where attempt `attempt` goes on from; and the same once more if the store lacks it.

    That the one which the store names is gone is not the end: the attempt before may have left
    another, whose points are all stored.
    """
    if attempt == 1:
        return None, None
    stored = jobs.checkpoint(job)
    if stored is not None:
        return stored, None
    found = newest(home.checkpoints(jobs[job].identity, job), attempt - 1)
    if found is not None:
        jobs.note_checkpoint(job, found)
    return found, found
