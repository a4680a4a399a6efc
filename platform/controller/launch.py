"""Running a workflow from a command: on this machine, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray

from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller, Outcome
from kvlab.platform.controller.jobs import new_job
from kvlab.platform.controller.lease import refuse_running
from kvlab.platform.controller.local import local_ray
from kvlab.platform.controller.pool import Pool
from kvlab.platform.controller.slots import Slots, check_fit
from kvlab.platform.graph import Graph
from kvlab.platform.home import Home
from kvlab.platform.record.feed import MakeMirror
from kvlab.platform.tracking.mirror import Mirror

Watch = Callable[[Controller], AbstractContextManager[Any]]
"""Makes the context in which a controller runs: a live view, signal handlers."""


def run_local(
    home: Home,
    workflow: Graph | int,
    watch: Watch,
    *,
    cpus: int | None = None,
    mlflow: bool = True,
) -> Outcome:
    """Run a new workflow, or go on with a stored one, on a Ray that lives as long as this call.

    Args:
        workflow: the graph to store and run, or the number of a stored workflow.
        cpus: CPUs that jobs may have; None: the machine's.
        mlflow: whether to mirror to MLflow.

    Raises:
        KvlabError: a job that does not fit this machine, a live controller, an unusable home.
    """
    home.create()
    with Store.open(home.url) as store:
        if isinstance(workflow, int):
            store.status(workflow)
        with local_ray(cpus):
            pool = Pool(home)
            number = workflow if isinstance(workflow, int) else submit(store, workflow, pool.slots)
            mirror = mirror_of(home) if mlflow else None
            controller = Controller(home, store, number, pool=pool, mirror=mirror)
            with _ended(pool), watch(controller):
                return controller.run()


def submit(store: Store, graph: Graph, slots: Slots) -> int:
    """Store a new workflow, if every job of it fits and nobody runs it; return its number."""
    check_fit(((cell.name, cell.resources) for cell in graph.cells), slots)
    refuse_running(store, graph.name)
    jobs = [new_job(cell) for cell in graph.cells]
    return store.create_workflow(graph.name, graph.text, dict(graph.report), jobs, time.time())


def mirror_of(home: Home) -> MakeMirror:
    """Return what makes the mirror's actor: a process of its own that takes no CPU from jobs."""
    actor: Any = ray.remote(num_cpus=0)(Mirror)
    return lambda: actor.remote(home.tracking_uri)


@contextmanager
def _ended(pool: Pool) -> Iterator[None]:
    try:
        yield
    finally:
        pool.close()
