"""Whether the benchmark had its machine to itself: what others used, from the kernel's counters."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

_STAT = Path("/proc/stat")
MOST_CORES = 0.25
"""Cores that others may use on average before a timing no longer counts as made alone."""
MOST_MEMORY = 1 << 30
"""Bytes of a GPU that may be taken before the job uses it: a context takes about half of it."""


class Counted(NamedTuple):
    """Seconds so far: of all processors at work, of this process's own work, and of the clock."""

    busy: float
    own: float
    wall: float


def others(begun: Counted, now: Counted) -> float:
    """Return how many cores others kept busy between two counts."""
    wall = now.wall - begun.wall
    return max(0.0, (now.busy - begun.busy) - (now.own - begun.own)) / wall if wall > 0 else 0.0


class Load:
    """Counts the processor time of all others, stolen time of a virtual machine included."""

    def __init__(self) -> None:
        self._begun = self._now()

    def cores(self) -> float | None:
        """Return how many cores others kept busy since the start; None where nothing says so."""
        now = self._now()
        return None if self._begun is None or now is None else others(self._begun, now)

    def _now(self) -> Counted | None:
        try:
            fields = _STAT.read_text().split("\n", 1)[0].split()[1:9]
            user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields)
        except (OSError, ValueError):
            return None
        ticks = user + nice + system + irq + softirq + stolen
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return Counted(busy, time.process_time(), time.monotonic())


def before(seconds: float = 0.5) -> float | None:
    """Watch the machine while this process rests; return the cores that others keep busy."""
    load = Load()
    time.sleep(seconds)
    return load.cores()


def taken(device: torch.device) -> int | None:
    """Return the bytes of the GPU in use before the job's own tensors; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
