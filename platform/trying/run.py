"""Running a try: its workflow again and again, longer each time, on one Ray and one set of workers.

A stage is the whole workflow so far. What an earlier stage (or an earlier run) finished is reused
by identity, so the last stage's workflow holds every job, and its YAML repeats all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvlab.db.errors import NoStore
from kvlab.db.rows import Workflow
from kvlab.db.states import WorkflowState
from kvlab.db.store import Store
from kvlab.platform.graph import Graph
from kvlab.platform.home import Home
from kvlab.platform.spec.read import load_graph

if TYPE_CHECKING:
    from kvlab.platform.controller.controller import Outcome
    from kvlab.platform.controller.launch import Watch


@dataclass(frozen=True, slots=True)
class Ran:
    """How a stage ended: its workflow, and what MLflow lacks of it (or None)."""

    workflow: Workflow
    state: WorkflowState
    mirror: str | None


class Runner:
    """Runs the stages of one try; Ray is started when the first of them has something to do.

    Use it as a context.

    Args:
        cpus: CPUs that jobs may have; None: the machine's. mlflow: whether to mirror to MLflow.
    """

    def __init__(self, home: Home, watch: Watch, cpus: int | None, mlflow: bool) -> None:
        self._home, self._watch, self._cpus, self._mlflow = home, watch, cpus, mlflow
        self._open = ExitStack()
        self._run: Callable[[Store, Graph | int], Outcome] | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def stage(self, text: str) -> Ran:
        """Run a workflow to its end; one that is done as it stands is only read.

        Raises:
            WorkflowError: a mistake in it. KvlabError: a job that fits no worker; it is running.
        """
        graph = load_graph(text, home=self._home.root, remember=True, cpus=self._cpus)
        known = stored(self._home, graph)
        if known is not None and known.row.state is WorkflowState.DONE:
            return Ran(known, WorkflowState.DONE, None)
        with Store.open(self._home.url) as store:
            if self._run is None:
                self._run = self._start()
            outcome = self._run(store, graph if known is None else known.row.id)
            return Ran(store.load(outcome.workflow), outcome.state, outcome.mirror)

    def _start(self) -> Callable[[Store, Graph | int], Outcome]:
        from kvlab.platform.controller.controller import Controller
        from kvlab.platform.controller.launch import mirror_of, submit
        from kvlab.platform.controller.local import local_ray
        from kvlab.platform.controller.pool import Pool

        self._home.create()
        self._open.enter_context(local_ray(self._cpus))
        pool = Pool(self._home)
        self._open.callback(pool.close)
        mirror = mirror_of(self._home) if self._mlflow else None

        def run(store: Store, workflow: Graph | int) -> Outcome:
            number = workflow if isinstance(workflow, int) else submit(store, workflow, pool.slots)
            controller = Controller(self._home, store, number, pool=pool, mirror=mirror)
            with self._watch(controller):
                return controller.run()

        return run


def stored(home: Home, graph: Graph) -> Workflow | None:
    """The newest workflow that is the graph, job for job; None: there is none.

    One that did not end is gone on with. One that is done is taken as it is, also where a speed of
    it is void: only `kvlab run` measures again.
    """
    try:
        store = Store.open(home.url, read_only=True)
    except NoStore:
        return None
    wanted = {cell.name: cell.identity for cell in graph.cells}
    with store:
        for row in store.workflows():
            if row.name != graph.name:
                continue
            found = store.load(row.id)
            if {job.name: job.identity for job in found.jobs} == wanted:
                return found
    return None
