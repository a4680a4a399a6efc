"""One attempt at a job, from its assignment to its end record. Needs no Ray."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from kvlab.db.states import Cause
from kvlab.platform.home import Home
from kvlab.platform.jobs import KINDS
from kvlab.platform.record import fault
from kvlab.platform.record.spool import NoSpool, SpoolWriter
from kvlab.platform.worker import causes
from kvlab.platform.worker.capture import Capture
from kvlab.platform.worker.checkpoints import sweep
from kvlab.platform.worker.context import JobContext
from kvlab.platform.worker.message import Assignment, Report

SETTLE_SECONDS = {Cause.STOPPED: 20.0, Cause.INFRASTRUCTURE: 5.0, Cause.OUT_OF_MEMORY: 5.0}
"""How long an attempt that may be continued waits for its last checkpoint to become visible."""

SILENT = frozenset({"noop"})
"""Kinds whose attempts log nothing of their own: thousands a second would each make a file."""

log = logging.getLogger("kvlab.worker")


class Attempt:
    """Runs the job and answers for it. `run` is called once; the rest any time, by any thread."""

    def __init__(self, assignment: Assignment, home: Home, capture: Capture | None = None) -> None:
        self.assignment = assignment
        self._home = home
        self._capture = capture
        self._spool: SpoolWriter = NoSpool()
        self._unspooled: OSError | None = None
        if assignment.rank == 0:
            try:
                self._spool = SpoolWriter(home.spool(assignment.job, assignment.attempt))
            except OSError as error:
                self._unspooled = error
        self._context = JobContext(assignment, home, self._spool)
        self._acknowledged = 0
        self.running = True

    def run(self) -> None:
        """Do the job, publish its artifacts, write the end record. A job's error is not raised."""
        one = self.assignment
        if self._capture is not None:
            self._capture.begin(self._home.log(one.workflow, one.cell, one.attempt, one.rank))
        spoken = one.kind not in SILENT
        began = time.monotonic()
        if spoken:
            log.info("%s, attempt %d: %s begins", one.cell, one.attempt, one.kind)
        try:
            end = self._work()
        except BaseException as error:  # a job may raise SystemExit as well; it must not end us
            end = self._failed(error)
        finally:
            _leave_group()
        if spoken:
            log.info("%s after %.1f s", end["cause"], time.monotonic() - began)
        try:
            self._context.close()
            fault.point("spool.before_end")
            self._spool.end(end)
            fault.point("spool.after_end")
        finally:
            self.running = False
            if self._capture is not None:
                self._capture.end()

    def acknowledge(self, offset: int) -> None:
        """Every record before `offset` is in the store."""
        self._acknowledged = max(self._acknowledged, offset)
        self._context.checkpoints.acknowledge(offset)

    def stop(self) -> None:
        """Ask the job to checkpoint and stop."""
        self._context.stop.set()

    def report(self, offset: int | None = None) -> Report:
        """Answer with what the spool holds from `offset` on; None: from what was acknowledged."""
        start = self._acknowledged if offset is None else offset
        # `running` is read first: what is in the spool after it was false includes the end record.
        running = self.running
        return Report(
            key=self.assignment.key,
            rank=self.assignment.rank,
            offset=start,
            data=self._spool.read(start),
            size=self._spool.size,
            progress=self._context.latest,
            hungry=self._context.checkpoints.hungry,
            running=running,
        )

    def close(self) -> None:
        self._spool.close()

    def _work(self) -> dict[str, Any]:
        one = self.assignment
        if self._unspooled is not None:
            raise self._unspooled
        if one.rank == 0 and one.attempt > 1:
            keep = None if one.restore is None else Path(one.restore[1])
            sweep(self._home.checkpoints(one.identity, one.job), one.attempt, keep)
        _set_threads(one.threads)
        result = KINDS[one.kind].run(one.spec, self._context)
        if one.rank != 0:
            return {"cause": Cause.DONE}
        result = causes.checked_result(result)
        self._context.checkpoints.raise_error()
        return {"cause": Cause.DONE, "result": result, "artifact": self._context.publish()}

    def _failed(self, error: BaseException) -> dict[str, Any]:
        cause, message = causes.classify(error, self.assignment.workers)
        if cause is not Cause.STOPPED:
            log.error("attempt ended: %s", cause, exc_info=error)
        try:
            self._context.checkpoints.settle(SETTLE_SECONDS.get(cause, 0.0))
        except OSError as late:
            if cause is Cause.STOPPED:
                cause, message = causes.classify(late)
        return {"cause": cause, "message": message, "at": time.time()}


def _set_threads(threads: int) -> None:
    # Read by torch when it is imported; set again where an earlier job imported it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
