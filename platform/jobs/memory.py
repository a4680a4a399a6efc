"""Memory of a stretch of work: its peak, what is left for it, and the errors of its end."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_ALLOCATOR = "DefaultCPUAllocator"
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Watches from its creation on.

    On CUDA: the most bytes the allocator held for tensors. On a CPU: how far the process's resident
    memory rose above what it was at the start, by the kernel's high-water mark, which is reset
    first (Linux); elsewhere the rise of the process's life-time maximum, which misses work that
    stays below an earlier peak. `source` says which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.source = "cuda allocator"
            return
        _give_back()
        try:
            _CLEAR.write_text("5")
            self._before, self.source = _status("VmRSS"), "resident memory above the start"
        except OSError:
            self._before, self.source = _lifetime(), "rise of the process's maximum"

    def bytes(self) -> int:
        """Return the peak in bytes since the start."""
        if self.source == "cuda allocator":
            return int(torch.cuda.max_memory_allocated(self.device))
        reset = self.source == "resident memory above the start"
        return max(0, (_status("VmHWM") if reset else _lifetime()) - self._before)


def free(device: torch.device) -> int:
    """Return the bytes that work on the device may still take; without a source, no limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MACHINE.read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
        sys.maxsize,
    )


def exhausted(error: BaseException) -> bool:
    """Say whether an error means that memory is at its end.

    On a CPU torch says so in a bare RuntimeError, by the name of its allocator.
    """
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and _ALLOCATOR in str(error))


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def _lifetime() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back() -> None:
    """Return freed heap to the kernel, so that earlier work does not hide the rise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
