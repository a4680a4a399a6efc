"""Where a number was made: versions, device, threads. Stored beside every result."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import kvlab
from kvlab.platform.jobs.context import Context


def prepare(context: Context, seed: int | None) -> torch.device:
    """Seed torch, give it the job's threads, and return the job's device."""
    torch.manual_seed(seed or 0)
    torch.set_num_threads(context.threads)
    return torch.device(context.device)


def capture(context: Context, **more: Any) -> dict[str, Any]:
    """Return the environment of a job as JSON; `more` is added to it."""
    device = torch.device(context.device)
    cuda = device.type == "cuda"
    return {
        "kvlab": kvlab.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": context.device,
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": _driver() if cuda else None,
        "threads": context.threads,
        "workers": context.workers,
        **more,
    }


@cache
def _commit() -> str | None:
    folder = Path(kvlab.__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None
