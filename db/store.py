"""The store: the only way into the database, and the truth about every workflow.

Killing any process at any instant loses nothing that a method returned from: a batch is one
transaction. (A power cut may undo the newest commits on SQLite, never corrupt the file.)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, insert

from kvlab.db import history, leases, points, queries, versions
from kvlab.db.batches import Batch
from kvlab.db.engine import connect, reading, told
from kvlab.db.errors import NoStore
from kvlab.db.pending import Pending, new_row
from kvlab.db.rows import (
    Event,
    FinishedJob,
    Lease,
    NewJob,
    Point,
    Status,
    Workflow,
    WorkflowRow,
)
from kvlab.db.states import WorkflowState
from kvlab.db.tables import JOBS, WORKFLOWS
from kvlab.db.text import clean, dump
from kvlab.db.url import parse, path_of, shown


class Store:
    """An open store. Thread safe; use one per process and `close` it (or use it as a context)."""

    def __init__(self, engine: Engine, url: Any) -> None:
        self._engine = engine
        self._reads = reading(engine)
        self._url = url
        self.place = shown(url)

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> Store:
        """Open the store at `sqlite:///FILE` or `postgresql://...`.

        A SQLite file that is missing or empty is created. PostgreSQL is prepared by
        `kvlab db upgrade`, and so is a store with older tables.

        Args:
            read_only: change nothing, not even a missing file.

        Raises:
            NoStore: nothing there (read only), or PostgreSQL without kvlab's tables.
            WrongVersion: older or newer tables.
            StoreError: a bad address, no connection, or a file that is no SQLite database.
        """
        parsed = parse(url)
        place = shown(parsed)
        local = parsed.get_backend_name() == "sqlite"
        if local and read_only and not path_of(parsed).exists():
            raise NoStore(f"there is no store at {place} yet: `kvlab run` makes it")
        engine = connect(parsed, read_only=read_only)
        try:
            with told(parsed):
                with reading(engine).begin() as connection:
                    fresh = versions.current(connection) is None
                if fresh and local and not read_only:
                    versions.create(engine, place)
                with reading(engine).begin() as connection:
                    versions.check(connection, place)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, parsed)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def create_workflow(
        self, name: str, text: str, report: dict[str, Any], jobs: Sequence[NewJob], now: float
    ) -> int:
        """Store a new workflow and its jobs, and return its number.

        Jobs that have parents or needs begin WAITING, the others QUEUED. Nobody holds the lease.
        """
        with self._writing() as connection:
            added = insert(WORKFLOWS).values(
                name=clean(name),
                text=clean(text),
                report=dump(report),
                state=WorkflowState.RUNNING.value,
                created_at=now,
                token=0,
            )
            workflow_id: int = connection.execute(added.returning(WORKFLOWS.c.id)).scalar_one()
            if jobs:
                connection.execute(insert(JOBS), [new_row(workflow_id, job) for job in jobs])
        return workflow_id

    def clock(self) -> float:
        """The time by which leases are to be kept: that of the database where hosts share one."""
        with self._reading() as connection:
            now = leases.clock(connection)
        return time.time() if now is None else now

    def claim(self, workflow_id: int, owner: str, ttl: float, now: float) -> Lease:
        """Become the workflow's only writer for `ttl` seconds.

        Args:
            owner: names this very controller process, e.g. "host:pid:start"; never reused.

        Raises:
            Held: another lease is live. NotFound: no such workflow.
        """
        with self._writing() as connection:
            return leases.claim(connection, workflow_id, clean(owner), ttl, now)

    def renew(self, lease: Lease, ttl: float, now: float) -> str | None:
        """Extend the lease; return what `request` asked for since the claim. Raises LeaseLost."""
        with self._writing() as connection:
            return leases.renew(connection, lease, ttl, now)

    def release(self, lease: Lease, state: WorkflowState, now: float) -> None:
        """Give the lease back; `state` is how the workflow ended. Raises LeaseLost."""
        with self._writing() as connection:
            leases.release(connection, lease, state, now)

    def request(self, workflow_id: int, what: str) -> None:
        """Ask whoever holds the workflow for something ("cancel", "stop"); see `renew`."""
        with self._writing() as connection:
            leases.request(connection, workflow_id, what)

    @contextmanager
    def batch(self, lease: Lease, now: float) -> Iterator[Batch]:
        """One transaction under a lease: all of it is stored, or none when an error leaves it.

        Raises:
            LeaseLost: the lease was released or taken over; nothing is written.
        """
        with self._writing() as connection:
            _, transaction = leases.guard(connection, lease)
            pending = Pending(connection, lease.workflow_id, now)
            yield Batch(pending, transaction)
            pending.write()

    def committed(self, transaction: str) -> bool:
        """Whether the batch of that `Batch.transaction` was stored though its end raised."""
        with self._writing() as connection:
            return leases.committed(connection, transaction)

    def finished(self, identities: Iterable[str]) -> dict[str, FinishedJob]:
        """The newest finished job of each identity that has one whose result may be reused."""
        with self._reading() as connection:
            return queries.finished(connection, identities)

    def have(self, identities: Iterable[str]) -> set[str]:
        """Those identities that `finished` would return, without reading their results."""
        with self._reading() as connection:
            return history.have(connection, identities)

    def done(self, limit: int) -> list[history.Done]:
        """The newest finished jobs, at most `limit`, with the time they took."""
        with self._reading() as connection:
            return history.done(connection, limit)

    def previous(self, workflow: str) -> dict[str, dict[str, str]]:
        """Cell name -> identity parts of its newest finished job in workflows of this name."""
        with self._reading() as connection:
            return history.previous(connection, workflow)

    def load(self, workflow_id: int) -> Workflow:
        """A workflow with its jobs, attempts, checkpoints and results, at one instant."""
        with self._reading() as connection:
            return queries.load(connection, workflow_id)

    def status(self, workflow_id: int) -> Status:
        """A workflow with its jobs' states, without specs and results."""
        with self._reading() as connection:
            return queries.status(connection, workflow_id)

    def workflows(self) -> list[WorkflowRow]:
        """Every workflow, newest first."""
        with self._reading() as connection:
            return queries.workflows(connection)

    def latest(self, name: str) -> int | None:
        """The number of the newest workflow of that name."""
        with self._reading() as connection:
            return queries.latest(connection, name)

    def events(self, workflow_id: int, after: int = 0) -> list[Event]:
        """The workflow's history, oldest first, from the event after number `after`."""
        with self._reading() as connection:
            return queries.events(connection, workflow_id, after)

    def points(
        self,
        job_id: int,
        keys: Sequence[str] | None = None,
        *,
        after_step: int | None = None,
        up_to_step: int | None = None,
    ) -> list[Point]:
        """A job's metric points by key and step, with after_step < step <= up_to_step."""
        with self._reading() as connection:
            return points.read(connection, job_id, keys, after_step, up_to_step)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with told(self._url), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with told(self._url), self._reads.begin() as connection:
            yield connection
