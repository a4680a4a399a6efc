"""One controller per workflow, whatever the clocks say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from kvlab.db.errors import Held, IllegalMove, LeaseLost, NotFound
from kvlab.db.rows import Lease
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store

RACER = """
import sys
from kvlab.db.errors import Held
from kvlab.db.store import Store

store = Store.open(sys.argv[1])
store.workflows()
print("ready", flush=True)
sys.stdin.readline()
won = []
for workflow in map(int, sys.argv[3:]):
    try:
        won.append([workflow, store.claim(workflow, sys.argv[2], 60.0, 100.0).token])
    except Held as held:
        assert held.owner != sys.argv[2]
print(won, flush=True)
"""


def test_a_live_lease_is_held(lab: Any) -> None:
    with pytest.raises(Held, match="is being run by controller") as caught:
        lab.store.claim(lab.workflow, "other", 30.0, 129.9)
    assert (caught.value.owner, caught.value.until) == ("controller", 130.0)


def test_not_even_its_own_name_claims_a_live_lease(lab: Any) -> None:
    with pytest.raises(Held):
        lab.store.claim(lab.workflow, "controller", 30.0, 101.0)


def test_a_lease_that_ended_is_taken_with_a_higher_token(lab: Any) -> None:
    taken = lab.store.claim(lab.workflow, "other", 30.0, 130.0)
    assert taken == Lease(lab.workflow, lab.lease.token + 1, "other")
    row = lab.store.load(lab.workflow).row
    assert (row.owner, row.expires_at, row.token) == ("other", 160.0, taken.token)


def test_renewing_extends_even_a_lease_that_ended_and_nobody_took(lab: Any) -> None:
    assert lab.store.renew(lab.lease, 30.0, 200.0) is None
    with pytest.raises(Held):
        lab.store.claim(lab.workflow, "other", 30.0, 229.0)


def test_whoever_lost_the_lease_writes_nothing(lab: Any) -> None:
    lab.store.claim(lab.workflow, "other", 30.0, 130.0)
    before = lab.store.load(lab.workflow)
    with pytest.raises(LeaseLost, match="lease"), lab.store.batch(lab.lease, 131.0):
        pytest.fail("the batch of a lost lease began")
    with pytest.raises(LeaseLost):
        lab.store.renew(lab.lease, 30.0, 131.0)
    with pytest.raises(LeaseLost):
        lab.store.release(lab.lease, WorkflowState.DONE, 131.0)
    assert lab.store.load(lab.workflow) == before


def test_a_forged_lease_is_refused(lab: Any) -> None:
    for forged in (
        Lease(lab.workflow, lab.lease.token, "other"),
        Lease(lab.workflow, lab.lease.token + 1, "controller"),
        Lease(lab.workflow + 1, lab.lease.token, "controller"),
    ):
        with pytest.raises(LeaseLost), lab.store.batch(forged, 101.0):
            pytest.fail("the batch of a forged lease began")


def test_a_released_workflow_is_free_and_its_old_lease_void(lab: Any) -> None:
    lab.store.release(lab.lease, WorkflowState.STOPPED, 110.0)
    row = lab.store.load(lab.workflow).row
    assert (row.state, row.ended_at, row.owner) == (WorkflowState.STOPPED, 110.0, None)
    with pytest.raises(LeaseLost), lab.store.batch(lab.lease, 111.0):
        pytest.fail("the batch of a released lease began")
    again = lab.store.claim(lab.workflow, "controller", 30.0, 111.0)
    assert again.token == lab.lease.token + 1
    row = lab.store.load(lab.workflow).row
    assert (row.state, row.ended_at) == (WorkflowState.RUNNING, None)


def test_a_workflow_that_is_done_stays_done(lab: Any) -> None:
    lab.store.release(lab.lease, WorkflowState.DONE, 110.0)
    again = lab.store.claim(lab.workflow, "mirror", 30.0, 111.0)
    assert lab.store.load(lab.workflow).row.state is WorkflowState.DONE
    with pytest.raises(IllegalMove):
        lab.store.release(again, WorkflowState.FAILED, 112.0)
    lab.store.release(again, WorkflowState.DONE, 112.0)
    row = lab.store.load(lab.workflow).row
    assert (row.state, row.ended_at, row.owner) == (WorkflowState.DONE, 110.0, None)


def test_no_workflow_is_released_as_running(lab: Any) -> None:
    with pytest.raises(IllegalMove):
        lab.store.release(lab.lease, WorkflowState.RUNNING, 110.0)


def test_a_request_is_heard_at_the_next_renewal_and_ends_with_the_lease(lab: Any) -> None:
    lab.store.request(lab.workflow, "cancel")
    assert lab.store.renew(lab.lease, 30.0, 101.0) == "cancel"
    assert lab.store.renew(lab.lease, 30.0, 102.0) == "cancel"
    lab.store.release(lab.lease, WorkflowState.CANCELLED, 103.0)
    lab.store.request(lab.workflow, "stop")
    again = lab.store.claim(lab.workflow, "other", 30.0, 104.0)
    assert lab.store.renew(again, 30.0, 105.0) is None


def test_a_workflow_that_does_not_exist_is_said(store: Store) -> None:
    for act in (
        lambda: store.claim(7, "me", 30.0, 0.0),
        lambda: store.request(7, "cancel"),
        lambda: store.load(7),
        lambda: store.status(7),
    ):
        with pytest.raises(NotFound, match="no workflow 7"):
            act()


def test_a_batch_that_raises_writes_nothing(lab: Any) -> None:
    before = lab.store.load(lab.workflow)
    with pytest.raises(ZeroDivisionError), lab.batch() as batch:  # noqa: PT012
        attempt = batch.start(lab.jobs[0], "worker")
        batch.points(lab.jobs[0], attempt, [("loss", 1, 0.5, 1)])
        batch.event("started", lab.jobs[0], attempt)
        raise ZeroDivisionError
    assert lab.store.load(lab.workflow) == before
    assert lab.store.points(lab.jobs[0]) == []
    assert lab.store.events(lab.workflow) == []


def test_a_batch_reaches_no_other_workflow(lab: Any, new_job: Any) -> None:
    other = lab.store.create_workflow("other", "", {}, [new_job("x")], 100.0)
    (job,) = lab.store.load(other).jobs
    with pytest.raises(LookupError), lab.batch() as batch:
        batch.start(job.id, "worker")
    with lab.batch() as batch:
        batch.mirrored(job.id, step=5)
    assert lab.store.load(other).jobs == (job,)


def test_of_two_processes_that_race_one_gets_each_lease(store_url: str, new_job: Any) -> None:
    with Store.open(store_url) as store:
        workflows = [store.create_workflow("w", "", {}, [], 100.0) for _ in range(20)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store_url, name, *map(str, workflows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1]) == [[workflow, 1] for workflow in workflows]


def test_a_stale_controller_is_fenced_in_the_middle_of_a_job(lab: Any) -> None:
    job = lab.jobs[0]
    attempt = lab.start(job)
    other = lab.store.claim(lab.workflow, "other", 30.0, 500.0)
    with lab.store.batch(other, 501.0) as batch:
        assert batch.end(job, attempt, Cause.NODE_LOST, JobState.QUEUED)
    with pytest.raises(LeaseLost):
        lab.end(job, attempt, Cause.DONE, JobState.DONE, result={})
    assert lab.row(job).state is JobState.QUEUED
