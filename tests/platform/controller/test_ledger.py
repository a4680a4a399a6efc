"""What is decided is stored once, whatever the database answers."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from kvlab.db import versions
from kvlab.db.errors import StoreError
from kvlab.db.rows import NewJob
from kvlab.db.states import JobState
from kvlab.db.store import Store
from kvlab.platform.controller.ledger import Ledger


class Forgetful(Store):
    """A store that does not hear the answer to some COMMITs, of which some took place."""

    losses: list[str]

    @contextmanager
    def batch(self, lease, now):
        loss = self.losses.pop(0) if self.losses else None
        with super().batch(lease, now) as batch:
            yield batch
            if loss == "rolled back":
                raise StoreError("the connection was closed before COMMIT")
        if loss == "committed":
            raise StoreError("the connection was closed before the answer to COMMIT")


@pytest.mark.postgres
@pytest.mark.parametrize("losses", [["committed"], ["rolled back"], ["rolled back", "committed"]])
def test_a_lost_answer_stores_nothing_twice(postgres_url, losses):
    versions.upgrade(postgres_url)
    with Forgetful.open(postgres_url) as store:
        store.losses = losses
        job = NewJob("a", "a", "noop", {}, {}, {}, (), "id", {})
        number = store.create_workflow("w", "", {}, [job], 0.0)
        (row,) = store.load(number).jobs
        ledger = Ledger(store, store.claim(number, "me", 60.0, 0.0))
        done = []

        def write(batch):
            batch.event("started", row.id, batch.start(row.id, "worker"))

        ledger.row(write)
        ledger.then(lambda: done.append("run"))
        ledger.commit(1.0)
        (row,) = store.load(number).jobs
        assert (row.state, row.attempt) == (JobState.RUNNING, 1)
        assert [event.kind for event in store.events(number)] == ["started"]
        assert done == ["run"]
        assert store.losses == []
