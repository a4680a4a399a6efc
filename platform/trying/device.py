"""The device that is tried on: which there is, and its memory, without torch and its context."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache

from kvlab import KvlabError
from kvlab.platform.trying.asked import Device


def choose(asked: str | None) -> Device:
    """Return the device: as asked, else a GPU where there is one.

    Raises:
        KvlabError: a device that is none, or a GPU that is not there.
    """
    if asked not in (None, "cpu", "cuda"):
        raise KvlabError(f"--device: must be cpu or cuda, found '{asked}'")
    if asked == "cuda" and not _gpu_bytes():
        raise KvlabError("--device: nvidia-smi finds no GPU on this machine: leave it out, or cpu")
    return "cpu" if asked == "cpu" or not _gpu_bytes() else "cuda"


def memory(device: Device) -> int:
    """Return the bytes of the device's memory."""
    if device == "cuda":
        return _gpu_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@lru_cache(maxsize=1)
def _gpu_bytes() -> int:
    """Memory of the first GPU; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return int(done.stdout.splitlines()[0]) << 20
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return 0
