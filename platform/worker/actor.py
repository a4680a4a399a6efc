"""The Ray actor that runs jobs, one at a time."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import ray

from kvlab.platform.home import Home
from kvlab.platform.worker.attempt import Attempt
from kvlab.platform.worker.capture import Capture
from kvlab.platform.worker.message import Assignment, Hello, Key, Recalled, Report, fields_of

GROUPS = {"jobs": 1, "control": 1}
"""Ray's concurrency groups: a running job never keeps a poll waiting."""


class Worker:
    """Created by `kvlab.platform.controller.pool`; never opens the database.

    Args:
        root: KVLAB_HOME. orphan_seconds: without a word from a controller for so long, and
            without a job, the process ends itself; None never.
    """

    def __init__(self, root: str, orphan_seconds: float | None = None) -> None:
        self._home = Home(Path(root), "")
        self._capture = Capture.install()
        self._attempt: Attempt | None = None
        self._lock = threading.Lock()
        self._begun: set[Key] = set()
        self._recalled: set[Key] = set()
        self._to_stop: set[Key] = set()
        self._port: socket.socket | None = None
        self._heard = time.monotonic()
        if orphan_seconds is not None:
            threading.Thread(
                target=self._end_orphan, args=(orphan_seconds,), name="orphan", daemon=True
            ).start()

    @ray.method(concurrency_group="control")
    def hello(self) -> Hello:
        """Say where this process is; for gangs, with a port that is kept free until `run`."""
        self._heard = time.monotonic()
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with self._lock:
            if self._port is None:
                self._port = socket.socket()
                self._port.bind((host, 0))
            port = self._port.getsockname()[1]
        node = ray.get_runtime_context().get_node_id()
        attempt = self._attempt
        key = None if attempt is None else attempt.assignment.key
        return Hello(os.getpid(), host, node, f"tcp://{host}:{port}", key)

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """End this process at once: when the caller is told that it died, it has."""
        os._exit(0)

    @ray.method(concurrency_group="jobs")
    def run(self, fields: list[Any]) -> list[Any]:
        """Run the job of an Assignment to its end; the answer is a Report, both as lists.

        It holds the spool's first piece.
        """
        assignment = Assignment.from_list(fields)
        with self._lock:
            if assignment.key in self._recalled:
                return fields_of(Report(key=None))
            if self._attempt is not None:
                self._attempt.close()
            if self._port is not None:
                self._port.close()
                self._port = None
            self._attempt = attempt = Attempt(assignment, self._home, self._capture)
            self._begun.add(assignment.key)
            if assignment.key in self._to_stop:
                attempt.stop()
        attempt.run()
        self._heard = time.monotonic()
        return fields_of(attempt.report())

    @ray.method(concurrency_group="control")
    def poll(self, key: Key | None, acknowledged: int) -> Report:
        """Take the acknowledgement for attempt `key`; answer what its spool holds beyond it."""
        self._heard = time.monotonic()
        attempt = self._attempt
        if attempt is None:
            return Report(key=None)
        if attempt.assignment.key != key:
            return attempt.report()
        attempt.acknowledge(acknowledged)
        # An adopter may have read less of the file than its predecessor had acknowledged.
        return attempt.report(acknowledged)

    @ray.method(concurrency_group="control")
    def stop(self, key: Key) -> None:
        """Ask the job of attempt `key` to checkpoint and stop."""
        with self._lock:
            attempt = self._attempt
            if attempt is not None and attempt.assignment.key == key:
                attempt.stop()
            self._to_stop.add(key)

    @ray.method(concurrency_group="control")
    def recall(self, key: Key) -> Recalled:
        """Take back an attempt that still waits for the one before it."""
        with self._lock:
            if key in self._begun:
                return Recalled(key, given_back=False)
            self._recalled.add(key)
            return Recalled(key, given_back=True)

    def _end_orphan(self, seconds: float) -> None:
        while True:
            time.sleep(min(5.0, seconds / 4))
            busy = self._attempt is not None and self._attempt.running
            if not busy and time.monotonic() - self._heard > seconds:
                os._exit(0)
