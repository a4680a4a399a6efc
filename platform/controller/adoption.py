"""Attempts that another controller began: they go on under this one, or end."""

from __future__ import annotations

from kvlab.db.states import Cause
from kvlab.platform.controller.attempts import Attempts
from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.controller.pool import Pool
from kvlab.platform.controller.salvage import last_sign
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.controller.slots import Slots
from kvlab.platform.home import Home
from kvlab.platform.record.spool import wait_unwritten

DEATH_SECONDS = 10.0
"""How long workers of a dead controller may take to die."""


class Adoption:
    """Takes over what ran when a controller died.

    Args:
        live: workers outlive their controllers, so that it is worth looking for them.
    """

    def __init__(
        self,
        home: Home,
        jobs: Jobs,
        schedule: Schedule,
        slots: Slots,
        pool: Pool,
        attempts: Attempts,
        *,
        live: bool,
    ) -> None:
        self._home = home
        self._jobs = jobs
        self._schedule = schedule
        self._slots = slots
        self._pool = pool
        self._attempts = attempts
        self._live = live

    def adopt(self, job: int, now: float) -> None:
        """Let a job's attempt go on if its workers are alive and have it; otherwise it ends here.

        Its spool is read from the file, which no worker writes any more by then.
        """
        worker = self._jobs[job].attempts[-1].worker
        shape = self._schedule.task(job).resources
        running = self._attempts.take_over(job, now)
        nodes = self._pool.find(worker, running.key, shape.workers) if self._live else None
        spool = self._home.spool(*running.key)
        if nodes is None:
            wait_unwritten(spool, DEATH_SECONDS)
        self._attempts.read_file(running, now)
        if nodes is not None:
            slot = self._slots.add_busy(shape, nodes)
            self._pool.adopt(slot.id, worker)
            self._attempts.go_on(running, slot.id)
            return
        running.asked = True
        # Workers of a cluster outlive controllers, so one that had begun died by itself.
        cause = Cause.NODE_LOST if self._live and spool.exists() else Cause.STOPPED
        end = running.tail.end or {"cause": cause, "message": "its controller died, and it did too"}
        worked_until = last_sign(self._home, running.tail, running.since)
        self._attempts.end(job, end, now, worked_until=worked_until)
