"""Running a workflow on a Ray cluster that is there: a detached controller, detached workers."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvlab import KvlabError
from kvlab.db.store import Store
from kvlab.platform.controller.controller import Controller, Outcome
from kvlab.platform.controller.launch import mirror_of, submit
from kvlab.platform.controller.lease import refuse_running
from kvlab.platform.controller.pool import NAMESPACE, Pool
from kvlab.platform.controller.snapshot import Snapshot
from kvlab.platform.graph import Graph
from kvlab.platform.home import Home

LINGER_SECONDS = 60.0
"""How long a controller whose workflow has ended waits for whoever started it to ask how."""

PROBE_SECONDS = 60.0


class ControllerActor:
    """A controller in a process of the cluster. It opens the database; nobody else does.

    Args:
        root, url: KVLAB_HOME and its database, the same on every node.
    """

    def __init__(self, root: str, url: str, mlflow: bool) -> None:
        self._home = Home(Path(root), url)
        self._home.create()
        self._store = Store.open(url)
        self._mlflow = mlflow
        self._controller: Controller | None = None
        self._ended = threading.Event()
        self._outcome: Outcome | None = None
        self._error: Exception | None = None

    def begin(self, workflow: Graph | int) -> int:
        """Store the workflow if it is new, run it in a thread, return its number at once."""
        if isinstance(workflow, int):
            refuse_running(self._store, self._store.status(workflow).row.name)
        pool = Pool(self._home, detached=True)
        number = (
            workflow if isinstance(workflow, int) else submit(self._store, workflow, pool.slots)
        )
        pool.label = _label(self._home, number)
        mirror = mirror_of(self._home) if self._mlflow else None
        self._controller = Controller(
            self._home, self._store, number, detached=True, pool=pool, mirror=mirror
        )
        threading.Thread(target=self._run, args=(pool,), name="controller").start()
        return number

    def wait(self, seconds: float) -> Outcome | None:
        """Return how it ended, None if it has not within `seconds`. Raises what the run raised."""
        if not self._ended.wait(seconds):
            return None
        if self._error is not None:
            raise self._error
        return self._outcome

    def snapshot(self, after: int) -> Snapshot:
        assert self._controller is not None
        return self._controller.snapshot(after)

    def stop(self) -> None:
        assert self._controller is not None
        self._controller.stop()

    def _run(self, pool: Pool) -> None:
        assert self._controller is not None
        try:
            self._outcome = self._controller.run()
            pool.close()
        except Exception as error:  # told by `wait`; workers are left for the next controller
            self._error = error
        self._ended.set()
        threading.Timer(LINGER_SECONDS, os._exit, (0,)).start()


class Remote:
    """A controller on a cluster, with the calls of one in this process."""

    def __init__(self, actor: Any, workflow: int) -> None:
        self._actor = actor
        self.workflow = workflow

    def snapshot(self, after: int = 0) -> Snapshot:
        with _told(f"workflow {self.workflow}"):
            found: Snapshot = ray.get(self._actor.snapshot.remote(after))
        return found

    def stop(self) -> None:
        self._actor.stop.remote()

    def run(self) -> Outcome:
        """Wait for the end.

        Raises:
            KvlabError: as `Controller.run`, or the controller's process is gone.
        """
        outcome: Outcome | None = None
        while outcome is None:
            with _told(f"workflow {self.workflow}"):
                outcome = ray.get(self._actor.wait.remote(0.5))
        ray.kill(self._actor)
        return outcome


@contextmanager
def _told(workflow: str) -> Iterator[None]:
    """Raise here what the controller raised there, and say it in one line where it is gone."""
    try:
        yield
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, KvlabError) else error) from None
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise KvlabError(
            f"the controller of {workflow} is gone, its jobs go on ({type(error).__name__}: "
            f"{reason}): `kvlab resume` with the same --address takes over"
        ) from error


def start(home: Home, workflow: Graph | int, *, mlflow: bool) -> Remote:
    """Start the workflow's controller on the connected cluster.

    Raises:
        KvlabError: the home or the database cannot serve the cluster's nodes, a job fits none.
    """
    check_shared(home)
    name = f"controller-{uuid.uuid4().hex[:16]}"
    make: Any = ray.remote(ControllerActor)
    actor = make.options(
        name=name, lifetime="detached", namespace=NAMESPACE, num_cpus=0, max_concurrency=8
    ).remote(str(home.root), home.url, mlflow)
    try:
        with _told("the new workflow"):
            number = ray.get(actor.begin.remote(workflow))
    except BaseException:
        ray.kill(actor)
        raise
    return Remote(actor, number)


def sweep(home: Home, workflow: int) -> None:
    """End the workers that a workflow's dead controller left on the connected cluster."""
    Pool(home, detached=True, label=_label(home, workflow)).sweep()


def _label(home: Home, workflow: int) -> str:
    """Unique on a cluster that several homes share."""
    return f"{hashlib.sha256(home.url.encode()).hexdigest()[:8]}-{workflow}"


def check_shared(home: Home) -> None:
    """Raise a KvlabError unless every node can write the home, and SQLite stays on one node."""
    nodes = list(Pool.nodes())
    if len(nodes) > 1 and not home.url.startswith("postgresql"):
        raise KvlabError(
            f"a cluster of {len(nodes)} nodes needs PostgreSQL, found {home.url.split(':')[0]}: "
            "set KVLAB_DATABASE=postgresql://..., then `kvlab db upgrade`"
        )
    token = uuid.uuid4().hex
    probe: Any = ray.remote(num_cpus=0)(_probe)
    asked = [
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(home.root), f"{token}-{node}"
        )
        for node in nodes
    ]
    problems = [text for text in ray.get(asked, timeout=PROBE_SECONDS) if text]
    found = {path.name for path in home.root.glob(f".probe-{token}-*")}
    for path in home.root.glob(f".probe-{token}-*"):
        path.unlink()
    unseen = [node for node in nodes if f".probe-{token}-{node}" not in found]
    if problems or unseen:
        why = problems[0] if problems else f"what node {unseen[0][:8]} writes is not seen here"
        raise KvlabError(
            f"KVLAB_HOME {home.root} must be one folder that every node can write ({why}): "
            "set KVLAB_HOME to a shared one"
        )


def _probe(root: str, token: str) -> str:
    """Leave a file in the home; return what hinders."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        Path(root, f".probe-{token}").touch()
    except OSError as error:
        return f"{error.strerror} on {ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]
    return ""
