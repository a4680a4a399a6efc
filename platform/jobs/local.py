"""Jobs without Ray: a context of plain folders, and one call that runs a job in this process."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class LocalContext:
    """What a job is given when tests and machines without Ray run it. See `Context`.

    Attributes:
        checkpoints: where checkpoints are kept, by step; None: nothing is ever restored.
        points: every logged point, (key, step) -> value.
        stop_after: `stopping()` turns true when it has been asked this many times.
    """

    folder: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    rank: int = 0
    workers: int = 1
    rendezvous: str | None = None
    checkpoints: Path | None = None
    stop_after: int | None = None
    points: dict[tuple[str, int], float] = field(default_factory=dict)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.points[key, step] = value

    def progress(self, done: float, total: float, note: str = "") -> None:
        pass

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self.checkpoints is None:
            return
        unfinished = self.checkpoints / f".{step}"
        unfinished.mkdir(parents=True)
        write(unfinished)
        older = [p for p in self.checkpoints.iterdir() if not p.name.startswith(".")]
        unfinished.rename(self.checkpoints / str(step))
        for path in older:
            shutil.rmtree(path)

    def restore(self) -> tuple[int, Path] | None:
        if self.checkpoints is None or not self.checkpoints.is_dir():
            return None
        steps = sorted(int(p.name) for p in self.checkpoints.iterdir() if p.name.isdigit())
        return (steps[-1], self.checkpoints / str(steps[-1])) if steps else None

    def stopping(self) -> bool:
        if self.stop_after is None:
            return False
        self.stop_after -= 1
        return self.stop_after < 0


def run_cell(
    kind: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    **context: Any,
) -> dict[str, Any]:
    """Run one job here and now.

    Args:
        kind: the folder of the kind under `kvlab.platform.jobs`.
        spec: its resolved spec. inputs: role -> folder that the parent's job filled.
        folder: where its artifacts go; made if it is not there.
        context: further fields of `LocalContext` (device, threads, checkpoints, ...).

    Returns:
        The job's result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"kvlab.platform.jobs.{kind}.run")
    given = LocalContext(folder=folder, inputs=inputs, **context)
    result: dict[str, Any] = module.run(spec, given)
    return result
