"""The spool: what one attempt reports, appended to a file by its worker and read by the recorder.

One JSON array a line; a line without its newline is not there yet. Records:

    ["p", step, time_ms, {key: value, ...}]     points of one step
    ["c", step, folder]                         a checkpoint became visible
    ["e", {cause, message, result, artifact}]   the attempt ended: always the last
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
"""Bytes that one read returns at most, unless a single record is longer."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


class SpoolWriter:
    """Appends records; every record is in the file when the call returns. Thread-safe.

    A record that does not fit on the disk is taken back whole and the OSError is raised; the end
    record is then kept in memory for `read`. The file is locked for as long as the writer lives,
    see `wait_unwritten`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
        with contextlib.suppress(OSError):  # some file systems have none
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock = threading.Lock()
        self._kept = b""
        self.size = os.fstat(self._fd).st_size

    def points(self, step: int, time_ms: int, metrics: Mapping[str, float]) -> None:
        self._append(["p", step, time_ms, {k: float(v) for k, v in metrics.items()}])

    def checkpoint(self, step: int, folder: str) -> None:
        self._append(["c", step, folder])

    def end(self, record: Mapping[str, Any]) -> None:
        """The attempt ended. Never raises OSError: a full disk must not look like a lost worker."""
        try:
            self._append(["e", record])
        except OSError:
            self._kept = _line(["e", record])
            self.size += len(self._kept)

    def read(self, offset: int, limit: int = CHUNK) -> bytes:
        """Return what stands at `offset`: `limit` bytes at most, or one longer record."""
        if self._kept and offset == self.size - len(self._kept):
            return self._kept
        return _whole(lambda at, size: os.pread(self._fd, size, at), offset, limit)

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, record: list[Any]) -> None:
        line = _line(record)
        with self._lock:
            written = 0
            try:
                while written < len(line):
                    written += os.write(self._fd, line[written:])
            except OSError:
                os.ftruncate(self._fd, self.size)
                raise
            self.size += len(line)


class NoSpool(SpoolWriter):
    """What ranks other than the first report to: it keeps the end record alone, in memory."""

    def __init__(self) -> None:
        self._data = b""
        self.size = 0

    def points(self, step: int, time_ms: int, metrics: Mapping[str, float]) -> None:
        pass

    def checkpoint(self, step: int, folder: str) -> None:
        pass

    def read(self, offset: int, limit: int = CHUNK) -> bytes:
        return self._data[offset:]

    def close(self) -> None:
        pass

    def _append(self, record: list[Any]) -> None:
        self._data += _line(record)
        self.size = len(self._data)


def _line(record: list[Any]) -> bytes:
    return _encode(record).encode() + b"\n"


def records(data: bytes) -> tuple[list[list[Any]], int]:
    """Parse the complete lines at the start of `data`.

    Returns:
        the records, and the number of bytes they take: where the next read starts.
    """
    end = data.rfind(b"\n") + 1
    if end == 0:
        return [], 0
    # One parse of one array is several times faster than a parse a line.
    return json.loads(b"[" + data[: end - 1].replace(b"\n", b",") + b"]"), end


def read_file(path: Path, offset: int) -> bytes:
    """Return what stands at `offset` of a spool: `CHUNK` bytes at most, or one longer record.

    Without the file it is b"".
    """
    try:
        with path.open("rb") as file:
            return _whole(lambda at, size: os.pread(file.fileno(), size, at), offset, CHUNK)
    except FileNotFoundError:
        return b""


def wait_unwritten(path: Path, seconds: float) -> bool:
    """Wait until no living process has the spool open for writing; False if one still has then."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return False
                time.sleep(0.05)
            except OSError:
                return True  # a file system without locks cannot say
            else:
                return True
    finally:
        os.close(descriptor)


def _whole(read: Callable[[int, int], bytes], offset: int, limit: int) -> bytes:
    """Read `limit` bytes, and on until they hold the end of a record or the file ends."""
    data = read(offset, limit)
    while b"\n" not in data and (more := read(offset + len(data), max(limit, len(data)))):
        data += more
    return data
