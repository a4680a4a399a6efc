"""Stores, workflows and leases; everything here comes on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvlab.db import versions
from kvlab.db.rows import JobRow, Lease, NewJob, Point
from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store

TTL = 30.0


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address at which there is nothing yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/kvlab.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def store_url(empty_url: str) -> str:
    """The address of a store without workflows."""
    versions.upgrade(empty_url)
    return empty_url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as store:
        yield store


@pytest.fixture
def new_job() -> Callable[..., NewJob]:
    """new_job(name, **changes) -> a job without parents."""

    def make(name: str, **changes: Any) -> NewJob:
        values: dict[str, Any] = {
            "name": name,
            "job": name.partition("[")[0],
            "kind": "noop",
            "spec": {"sleep": 0.0, "points": 3, "fail": None},
            "axes": {"seed": 0},
            "parents": {},
            "needs": (),
            "identity": f"identity of {name}",
            "parts": {"spec": "aa", "source": "bb"},
            "resources": {"cpus": 1},
            "retries": {"node_lost": 3},
        }
        return NewJob(**{**values, **changes})

    return make


@dataclass
class Lab:
    """A claimed workflow of three jobs; `now` is the clock."""

    store: Store
    workflow: int
    lease: Lease
    jobs: list[int]
    now: float = 100.0

    def batch(self) -> Any:
        self.now += 1
        return self.store.batch(self.lease, self.now)

    def start(self, job: int, worker: str = "worker") -> int:
        with self.batch() as batch:
            return int(batch.start(job, worker))

    def end(self, job: int, attempt: int, cause: Cause, state: JobState, **more: Any) -> bool:
        with self.batch() as batch:
            return bool(batch.end(job, attempt, cause, state, **more))

    def finish(self, job: int, **result: Any) -> None:
        attempt = self.start(job)
        assert self.end(job, attempt, Cause.DONE, JobState.DONE, result=result)

    def log(self, job: int, attempt: int, *rows: tuple[str, int, float]) -> int:
        with self.batch() as batch:
            return int(batch.points(job, attempt, [(*row, 1_000) for row in rows]))

    def row(self, job: int) -> JobRow:
        return next(row for row in self.store.load(self.workflow).jobs if row.id == job)

    def values(self, job: int) -> list[tuple[str, int, float, int]]:
        points: list[Point] = self.store.points(job)
        return [(p.key, p.step, p.value, p.attempt) for p in points]


@pytest.fixture
def lab(store: Store, new_job: Callable[..., NewJob]) -> Lab:
    workflow = store.create_workflow("study", "text", {}, [new_job(n) for n in "abc"], 100.0)
    lease = store.claim(workflow, "controller", TTL, 100.0)
    return Lab(store, workflow, lease, [job.id for job in store.load(workflow).jobs])
