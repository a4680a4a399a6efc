"""Files that a controller did not come to remove before it died."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvlab.db.rows import JobRow
from kvlab.db.states import JobState
from kvlab.platform import artifacts
from kvlab.platform.home import Home


def clear(home: Home, jobs: Iterable[JobRow]) -> None:
    """Remove spools and work folders of ended attempts, and checkpoints of done jobs.

    Only the jobs given are touched: other workflows may be running in the same home.
    """
    rows = {row.id: row for row in jobs}
    for folder in (home.root / "spool", home.root / "work"):
        for path in folder.iterdir():
            job, _, attempt = path.stem.partition("-")
            row = rows.get(int(job)) if job.isdigit() else None
            if row is None:
                continue
            if row.state is JobState.RUNNING and attempt == str(row.attempt):
                continue
            _remove(path)
    for row in rows.values():
        if row.state is JobState.DONE and row.attempt:
            forget_checkpoints(home, row.identity, row.id)


def forget_checkpoints(home: Home, identity: str, job: int) -> None:
    """Remove a done job's checkpoints."""
    folder = home.checkpoints(identity, job)
    if not folder.parent.exists():
        return
    artifacts.remove(folder)
    try:
        folder.parent.rmdir()
    except OSError:
        return  # another workflow's job of the same identity has some


def _remove(path: Path) -> None:
    if path.is_dir():
        artifacts.remove(path)
    else:
        path.unlink(missing_ok=True)
