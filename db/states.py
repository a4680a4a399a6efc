"""The states and causes that rows carry, and which change of state is legal. Pure Python."""

from __future__ import annotations

from enum import StrEnum


class WorkflowState(StrEnum):
    """running -> done | failed | stopped | cancelled; stopped, failed and cancelled may resume."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"


class JobState(StrEnum):
    """Where a job is. A job row belongs to one workflow; its identity may occur in many."""

    WAITING = "waiting"  # some parent is not done
    QUEUED = "queued"  # may run now, or after a back-off
    RUNNING = "running"  # its newest attempt is with a worker
    DONE = "done"  # has a result (its own, or another job's: reused_from)
    FAILED = "failed"  # its newest attempt ended in a cause with no retry left
    SKIPPED = "skipped"  # a parent failed, was skipped or cancelled
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobState.DONE, JobState.FAILED, JobState.SKIPPED, JobState.CANCELLED})

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.WAITING: frozenset({JobState.QUEUED, JobState.SKIPPED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.DONE, JobState.FAILED, JobState.QUEUED, JobState.CANCELLED}
    ),
    JobState.DONE: frozenset(),
    # `resume` gives what did not finish another chance.
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.SKIPPED: frozenset({JobState.WAITING}),
    JobState.CANCELLED: frozenset({JobState.WAITING}),
}

REUSABLE = frozenset({JobState.WAITING, JobState.QUEUED})
"""States from which a job may become DONE with another job's result, without an attempt."""


class Cause(StrEnum):
    """Why an attempt ended."""

    DONE = "done"
    NODE_LOST = "node_lost"  # worker process or node died, or was preempted
    OUT_OF_MEMORY = "out_of_memory"
    INFRASTRUCTURE = "infrastructure"  # disk full, artifact store, Ray itself
    USER_ERROR = "user_error"  # never retried
    DIVERGED = "diverged"  # NaN or infinite loss
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # driver stopped or died: runs again at `resume`, costs no retry
    CANCELLED = "cancelled"
