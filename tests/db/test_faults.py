"""A full disk, a held lock, a server that hangs up: one line each, nothing half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from kvlab.db import engine
from kvlab.db.engine import connect
from kvlab.db.errors import StoreError
from kvlab.db.states import Cause, JobState
from kvlab.db.store import Store
from kvlab.db.url import parse


def one_line(error: StoreError) -> bool:
    return "\n" not in str(error) and "SQL" not in str(error).removeprefix("store sqlite")


@pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
def test_a_full_disk_loses_one_batch_and_nothing_else(lab: Any) -> None:
    """SQLite's own page limit raises what a full disk raises."""
    job = lab.jobs[0]
    lab.start(job)
    with lab.store._engine.begin() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    before = lab.store.load(lab.workflow)
    rows = [(f"key {n}", step, 0.5, step) for n in range(50) for step in range(200)]
    with pytest.raises(StoreError, match=r"full: free some space") as caught, lab.batch() as batch:  # noqa: PT012
        batch.points(job, 1, rows)
        batch.end(job, 1, Cause.STOPPED, JobState.QUEUED)
    assert one_line(caught.value)
    assert lab.store.load(lab.workflow) == before
    assert lab.store.points(job) == []
    with lab.store._engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    with lab.batch() as batch:
        assert batch.points(job, 1, rows) == len(rows)


def test_a_writer_that_waits_too_long_is_told_so(
    lab: Any, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WAIT_SECONDS", 0.05)
    with Store.open(store_url) as other:
        with lab.batch() as batch:
            batch.start(lab.jobs[0], "worker")
            with pytest.raises(StoreError, match="another process holds it") as caught:
                other.request(lab.workflow, "cancel")
        assert one_line(caught.value)
        other.request(lab.workflow, "cancel")
    assert lab.row(lab.jobs[0]).state is JobState.RUNNING
    assert lab.store.renew(lab.lease, 30.0, lab.now) == "cancel"


@pytest.mark.postgres
@pytest.mark.parametrize("empty_url", ["postgres"], indirect=True)
def test_a_server_that_hangs_up_costs_one_batch_at_most(lab: Any, store_url: str) -> None:
    def hang_up() -> None:
        other = connect(parse(store_url))
        with other.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        other.dispose()

    hang_up()
    lab.start(lab.jobs[0])
    before = lab.store.load(lab.workflow)
    with pytest.raises(StoreError) as caught, lab.batch() as batch:  # noqa: PT012
        batch.start(lab.jobs[1], "worker")
        hang_up()
    assert one_line(caught.value)
    assert lab.store.load(lab.workflow) == before
    lab.start(lab.jobs[1])


def test_the_write_lock_is_free_after_a_reader_and_an_error(lab: Any, tmp_path: Path) -> None:
    with pytest.raises(LookupError), lab.batch() as batch:
        batch.start(999, "worker")
    lab.store.load(lab.workflow)
    lab.start(lab.jobs[0])
