"""The Context that jobs get from a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kvlab.platform import artifacts
from kvlab.platform.home import Home
from kvlab.platform.record.spool import SpoolWriter
from kvlab.platform.worker.checkpoints import Checkpoints
from kvlab.platform.worker.message import Assignment


class JobContext:
    """Implements `kvlab.platform.jobs.context.Context` on a spool and a KVLAB_HOME."""

    def __init__(self, assignment: Assignment, home: Home, spool: SpoolWriter) -> None:
        self.inputs: Mapping[str, Path] = {k: Path(v) for k, v in assignment.inputs.items()}
        self.device = "cuda:0" if assignment.gpus else "cpu"
        self.threads = assignment.threads
        self.rank = assignment.rank
        self.workers = assignment.workers
        self.rendezvous = assignment.rendezvous
        self.latest: tuple[float, float, str] | None = None
        self.stop = threading.Event()
        self.stopping = self.stop.is_set
        self._restore = assignment.restore
        self._spool = spool
        work = home.work(assignment.job, assignment.attempt)
        self._folder = work / str(self.rank)
        self._target = home.artifact(assignment.identity)
        self.checkpoints = Checkpoints(
            home.checkpoints(assignment.identity, assignment.job), assignment.attempt, spool
        )

    @property
    def folder(self) -> Path:
        # Made by the first use: most evaluations and all no-op jobs publish nothing.
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._spool.points(step, time.time_ns() // 1_000_000, metrics)

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.latest = (done, total, note)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self.rank == 0:
            self.checkpoints.save(step, write)

    def restore(self) -> tuple[int, Path] | None:
        return None if self._restore is None else (self._restore[0], Path(self._restore[1]))

    def publish(self) -> str | None:
        """Make the folder's files the job's artifacts; return where they are, None without any."""
        if self.rank != 0:
            return None
        target = artifacts.publish(self._folder, self._target)
        return None if target is None else str(target)

    def close(self) -> None:
        """Remove what the attempt leaves behind besides artifacts and visible checkpoints."""
        self.checkpoints.close()
        if self._folder.parent.exists():
            artifacts.remove(self._folder)
            if self.rank == 0:
                artifacts.remove(self._folder.parent)
