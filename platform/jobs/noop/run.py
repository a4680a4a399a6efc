"""A job that does nothing but what it is told: for benches and fault tests."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvlab.platform.jobs.context import Context, Diverged, JobError, Stopped

TICK = 0.02
"""Seconds between two looks at `stopping()` while sleeping."""


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Log points, checkpoint, sleep, and fail where asked.

    Args:
        spec: points (steps, each one point), sleep (seconds, spread over the steps), fail (see
            `_fail`); and, where they are there, checkpoints (steps between two; 0: none) and
            fail_at (the step before which it fails; None: after the last), fail_rank (the rank
            of a gang that fails; None: every one) and publish (leave a file).

    Returns:
        {"points": steps, "started_from": the step of the checkpoint it went on from}, and for a
        gang "met": how many ranks an all-reduce counted.
    """
    if spec.get("fail_rank") not in (None, context.rank):
        spec = {**spec, "fail": None}
    result = {"met": _meet(context)} if context.workers > 1 else {}
    steps, every = int(spec["points"]), int(spec.get("checkpoints") or 0)
    fail_at = spec.get("fail_at")
    found = context.restore()
    begin = json.loads((found[1] / "step.json").read_text()) if found else 0
    pause = spec["sleep"] / max(1, steps)
    for step in range(begin, max(1, steps)):
        if spec["fail"] and fail_at == step:
            _fail(spec["fail"], context)
        _sleep(pause, context)
        if step < steps:
            context.log({"value": float(step)}, step + 1)
            context.progress(step + 1, steps)
            if every and (step + 1) % every == 0:
                _checkpoint(context, step + 1)
    if spec["fail"] and fail_at is None:
        _fail(spec["fail"], context)
    if spec.get("publish"):
        (context.folder / "noop.json").write_text(json.dumps(steps))
    return {**result, "points": steps, "started_from": begin}


def _meet(context: Context) -> int:
    """Count the ranks, which all have to be there for it."""
    import torch

    from kvlab.platform.jobs.training.gang import join

    with join(context) as gang:
        return int(gang.total(torch.ones(1)).item())


def _checkpoint(context: Context, step: int) -> None:
    def write(folder: Path) -> None:
        (folder / "step.json").write_text(json.dumps(step))

    context.checkpoint(step, write)


def _sleep(seconds: float, context: Context) -> None:
    end = time.monotonic() + seconds
    while True:
        if context.stopping():
            raise Stopped
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(TICK, left))


def _fail(how: str, context: Context) -> None:
    """End as a real job may: a raised cause, a full disk, or the process itself gone."""
    if how == "nan":
        raise Diverged("the loss is nan, as asked")
    if how == "oom":
        raise MemoryError("out of memory, as asked")
    if how == "user":
        raise JobError("cannot be done, as asked")
    if how == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(context.folder))
    if how == "exit":
        os._exit(17)
    raise JobError(f"noop: unknown way to fail '{how}'")
