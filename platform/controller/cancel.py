"""Cancelling from outside: the controller is asked, or its place is taken if it is gone."""

from __future__ import annotations

import time

from kvlab import KvlabError
from kvlab.db.errors import Held
from kvlab.db.rows import Lease
from kvlab.db.states import TERMINAL, Cause, JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller.lease import claim

WAIT_SECONDS = 30.0


def cancel(store: Store, workflow: int) -> list[str]:
    """Cancel a workflow and wait until it is.

    Returns:
        names of jobs that a cluster may still be running: their controller is gone.

    Raises:
        KvlabError: it has ended, or its live controller does not answer.
    """
    row = store.status(workflow).row
    if row.state in (WorkflowState.DONE, WorkflowState.CANCELLED):
        raise KvlabError(f"workflow {workflow} is {row.state}: there is nothing to cancel")
    try:
        lease = claim(store, workflow)
    except Held:
        store.request(workflow, "cancel")
        _wait(store, workflow)
        return []
    return _cancel(store, lease)


def _wait(store: Store, workflow: int) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while store.status(workflow).row.state is WorkflowState.RUNNING:
        if time.monotonic() > end:
            raise KvlabError(
                f"workflow {workflow}: its controller was asked to cancel and has not answered "
                f"for {WAIT_SECONDS:g} s; it will when it can"
            )
        time.sleep(0.2)


def _cancel(store: Store, lease: Lease) -> list[str]:
    now, left = time.time(), []
    with store.batch(lease, now) as batch:
        for job in store.load(lease.workflow_id).jobs:
            if job.state is JobState.RUNNING:
                batch.end(job.id, job.attempt, Cause.CANCELLED, JobState.CANCELLED)
                # A label in the name says that a cluster has it: local ones die with their driver.
                if not job.attempts[-1].worker.startswith("worker--"):
                    left.append(job.name)
            elif job.state not in TERMINAL:
                batch.move(job.id, JobState.CANCELLED)
        batch.event("cancelled")
    store.release(lease, WorkflowState.CANCELLED, now)
    return left
