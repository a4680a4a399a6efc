"""What is looked at before Ray is started: who runs the workflow, and whether it is done."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kvlab.db.errors import NoStore
from kvlab.db.states import JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller.lease import described, refuse_running, running_here

if TYPE_CHECKING:
    from kvlab.platform.graph import Graph
    from kvlab.platform.home import Home


def look(home: Home, workflow: Graph | int, cpus: int | None) -> None:
    """Refuse a workflow that a live process runs; warn where another one shares this machine.

    Raises:
        KvlabError: one of that name is running.
    """
    try:
        store = Store.open(home.url, read_only=True)
    except NoStore:
        return
    with store:
        name = store.status(workflow).row.name if isinstance(workflow, int) else workflow.name
        refuse_running(store, name)
        others = running_here(store) if cpus is None else []
    if others:
        print(
            f"{described(others[0])} too, and both take this machine's CPUs: "
            "`--cpus N` says how many this one may have",
            file=sys.stderr,
        )


def nothing_left(home: Home, workflow: int, mlflow: bool) -> bool:
    """Whether the workflow is done, and MLflow holds all of it where it is to."""
    with Store.open(home.url, read_only=True) as store:
        if store.status(workflow).row.state is not WorkflowState.DONE:
            return False
        jobs = store.load(workflow).jobs if mlflow else ()
    return all(job.mirrored_state is JobState.DONE for job in jobs)
