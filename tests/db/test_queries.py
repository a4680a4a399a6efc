"""What is read back, and that it is one instant's."""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy import event

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store


def test_a_workflow_comes_back_as_it_was_given(store: Store, new_job: Any) -> None:
    jobs = [
        new_job("data", kind="data", axes={}, timeout=60.0),
        new_job("base[seed=0]", parents={"data": "data"}, spec={"deep": {"list": [1, None, "ü"]}}),
        new_job("after", needs=("data", "base[seed=0]"), retries={}, resources={"gpus": 1}),
    ]
    report = {"baseline": "base", "pareto": ["perplexity"]}
    number = store.create_workflow("study", "version: 1\n# ü\n", report, jobs, 12.5)
    workflow = store.load(number)
    assert (workflow.text, workflow.report) == ("version: 1\n# ü\n", report)
    row = workflow.row
    assert (row.id, row.name, row.state) == (number, "study", WorkflowState.RUNNING)
    assert (row.created_at, row.owner, row.expires_at, row.token) == (12.5, None, None, 0)
    assert [job.name for job in workflow.jobs] == ["data", "base[seed=0]", "after"]
    for given, found in zip(jobs, workflow.jobs, strict=True):
        for name in type(given).__slots__:
            assert getattr(found, name) == getattr(given, name), name
        assert (found.attempt, found.attempts, found.result) == (0, (), None)
    assert [job.state for job in workflow.jobs] == [
        JobState.QUEUED,
        JobState.WAITING,
        JobState.WAITING,
    ]


def test_a_workflow_may_have_no_jobs(store: Store) -> None:
    assert store.load(store.create_workflow("empty", "", {}, [], 0.0)).jobs == ()


def test_workflows_are_listed_newest_first_and_found_by_name(store: Store) -> None:
    one, two, three = (store.create_workflow(n, "", {}, [], 0.0) for n in ("a", "b", "a"))
    assert [row.id for row in store.workflows()] == [three, two, one]
    assert (store.latest("a"), store.latest("b"), store.latest("c")) == (three, two, None)


def test_status_counts_states_in_their_order(lab: Any) -> None:
    lab.finish(lab.jobs[1])
    lab.start(lab.jobs[2])
    status = lab.store.status(lab.workflow)
    assert list(status.counts.items()) == [
        (JobState.QUEUED, 1),
        (JobState.RUNNING, 1),
        (JobState.DONE, 1),
    ]
    done = status.jobs[1]
    assert (done.name, done.cause, done.attempt, done.ended_at) == ("b", Cause.DONE, 1, 102.0)


def test_finished_takes_the_newest_of_each_identity(lab: Any, new_job: Any) -> None:
    lab.finish(lab.jobs[0], loss=1.0)
    lab.start(lab.jobs[1])
    second = lab.store.create_workflow("again", "", {}, [new_job("a"), new_job("d")], 200.0)
    lab.lease, lab.workflow = lab.store.claim(second, "controller", 30.0, 200.0), second
    for job in lab.store.load(second).jobs:
        lab.finish(job.id, loss=2.0)
    wanted = [f"identity of {name}" for name in "abcda"]
    found = lab.store.finished(wanted)
    assert {identity: job.result["loss"] for identity, job in found.items()} == {
        "identity of a": 2.0,
        "identity of d": 2.0,
    }
    assert {job.workflow_id for job in found.values()} == {second}
    assert lab.store.finished([]) == {}


def test_finished_takes_more_identities_than_one_statement(lab: Any) -> None:
    lab.finish(lab.jobs[0])
    wanted = [f"missing {n}" for n in range(12_000)] + ["identity of a"]
    assert list(lab.store.finished(wanted)) == ["identity of a"]


def test_what_is_loaded_is_one_instants(lab: Any, store_url: str) -> None:
    """A batch is committed after the first statement of the reader: it sees none of it."""
    job = lab.jobs[0]
    lab.start(job)
    before = lab.store.load(lab.workflow)
    written: list[bool] = []

    def write(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and not written:
            written.append(True)
            lab.end(job, 1, Cause.DONE, JobState.DONE, result={}, artifact_uri="file:///x")

    with Store.open(store_url) as reader:
        event.listen(reader._engine, "after_cursor_execute", write)
        assert reader.load(lab.workflow) == before
        assert reader.load(lab.workflow) == lab.store.load(lab.workflow) != before
    assert written


def test_readers_see_whole_batches_and_never_wait(lab: Any, store_url: str) -> None:
    """In every batch all three jobs move together, and one point is added to each."""
    torn: list[Any] = []
    read = threading.Event()
    over = threading.Event()

    def look() -> None:
        with Store.open(store_url, read_only=True) as store:
            while not over.is_set():
                jobs = store.load(lab.workflow).jobs
                if len({(j.state, j.attempt, len(j.attempts)) for j in jobs}) != 1:
                    torn.append(jobs)
                read.set()

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(1, 41):
            with lab.batch() as batch:
                for job in lab.jobs:
                    batch.start(job, "worker")
            with lab.batch() as batch:
                for job in lab.jobs:
                    batch.points(job, turn, [("loss", turn, 1.0, 1)])
                    batch.end(job, turn, Cause.NODE_LOST, JobState.QUEUED)
                if turn == 1:
                    read.clear()
                    assert read.wait(20), "readers wait for the batch to end"
    finally:
        over.set()
        for reader in readers:
            reader.join(20)
    assert torn == []
    assert [len(lab.values(job)) for job in lab.jobs] == [40, 40, 40]
