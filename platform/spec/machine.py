"""What measured numbers belong to, read without importing torch or starting a process."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvlab.platform.graph import Resources

_NVIDIA = Path("/proc/driver/nvidia")
_PROCESSORS = Path("/proc/cpuinfo")
_SHARE = Path("/sys/fs/cgroup/cpu.max")


@lru_cache(maxsize=1)
def _gpu() -> tuple[str, str] | None:
    """(model, driver version) of the first NVIDIA GPU, or None."""
    for information in sorted(_NVIDIA.glob("gpus/*/information")):
        model = _field(information, "Model")
        if model:
            words = (_NVIDIA / "version").read_text(errors="replace").split("Kernel Module")
            driver = words[-1].split()[0] if len(words) > 1 and words[-1].split() else "unknown"
            return model, driver
    return None


@lru_cache(maxsize=1)
def _processor() -> str:
    return _field(_PROCESSORS, "model name") or platform.processor() or platform.machine()


def _field(path: Path, name: str) -> str:
    try:
        with path.open(errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        return ""
    return ""


def cpus() -> int:
    """CPUs that this process may use: those it is bound to, within its container's share."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = _SHARE.read_text().split()
        own = min(own, max(1, int(quota) // int(period)))  # "max" is no number: no limit
    return own


def describe(
    resources: Resources, cluster: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Return device, threads and driver as a job with these resources would find them here.

    Args:
        limit: CPUs that jobs may have (`--cpus`); None: all that there are.

    Of a cluster only its address is known before a job runs: numbers measured there are reused
    there alone.
    """
    if cluster is not None:
        return {"cluster": cluster, "gpus": resources.gpus, "threads": resources.cpus}
    gpu = _gpu() if resources.gpus else None
    threads = (limit or cpus()) if resources.exclusive else resources.cpus
    if gpu is not None:
        return {"device": gpu[0], "threads": threads, "driver": gpu[1]}
    return {"device": _processor(), "threads": threads, "driver": None}
