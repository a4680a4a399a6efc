"""Named points at which a process kills itself, so that tests can try every crash.

`KVLAB_FAULT=point` or `KVLAB_FAULT=point:3` (the third time it is passed) arms one point in every
process that inherits it. `KVLAB_FAULT_MARK=FILE` makes it fire once in all of them together: the
first to create the file dies.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

POINTS = (
    "start.before_commit",
    "start.after_commit",
    "end.before_commit",
    "end.after_commit",
    "record.before_commit",
    "record.after_commit",
    "finish.before_commit",
    "finish.after_commit",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "publish.before_rename",
    "publish.after_rename",
    "spool.before_end",
    "spool.after_end",
)


class Fuse:
    """What is armed in this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name, _, count = environment.get("KVLAB_FAULT", "").partition(":")
        self.name = name
        self._left = int(count or 1)
        self._mark = environment.get("KVLAB_FAULT_MARK")

    def burn(self) -> bool:
        """Count one passing of the armed point; True when the process must die."""
        self._left -= 1
        if self._left > 0:
            return False
        if self._mark is None:
            return True
        try:
            os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


_FUSE = Fuse(os.environ)
ARMED = bool(_FUSE.name)


def point(name: str) -> None:
    """Kill this process with SIGKILL if `name` is armed; nothing otherwise."""
    if ARMED and name == _FUSE.name and _FUSE.burn():
        os.kill(os.getpid(), signal.SIGKILL)
