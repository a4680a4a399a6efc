"""Standard output, standard error and logging of a job go to its log file."""

from __future__ import annotations

import io
import logging
import sys
import threading
from pathlib import Path
from typing import TextIO


class Capture(io.TextIOBase):
    """Stands in for sys.stdout and sys.stderr of a worker process, which runs one job at a time.

    While `path` is set, what is written goes there; the file is made by the first write. Without,
    it goes where it went before.
    """

    def __init__(self, otherwise: TextIO) -> None:
        self._otherwise = otherwise
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._lock = threading.RLock()

    @classmethod
    def install(cls) -> Capture:
        """Put one capture in the place of both streams, and let logging's INFO reach it."""
        capture = cls(sys.__stderr__ or sys.stderr)
        sys.stdout = sys.stderr = capture
        logging.basicConfig(
            stream=capture,
            level=logging.INFO,
            force=True,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        return capture

    def begin(self, path: Path) -> None:
        with self._lock:
            self._path = path

    def end(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._path = self._file = None

    def write(self, text: str) -> int:
        with self._lock:
            try:
                (self._open() or self._otherwise).write(text)
            except OSError:
                # A full disk must end a job where it saves, not where it prints.
                return len(text)
        return len(text)

    def flush(self) -> None:
        pass  # Files are line-buffered.

    def writable(self) -> bool:
        return True

    def _open(self) -> TextIO | None:
        if self._file is None and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1, encoding="utf-8", errors="replace")
        return self._file
