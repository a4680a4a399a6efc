"""What a worker that is gone left on the disk."""

from __future__ import annotations

from pathlib import Path

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
