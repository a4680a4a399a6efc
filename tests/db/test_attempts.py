"""Attempts: numbered, fenced, ended once; and every move of a job that is or is not legal."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvlab.db.errors import IllegalMove
from kvlab.db.rows import AttemptRow, FinishedJob
from kvlab.db.states import MOVES, REUSABLE, Cause, JobState
from kvlab.db.store import Store


def test_an_attempt_from_start_to_end(lab: Any) -> None:
    job = lab.jobs[0]
    with lab.batch() as batch:
        assert batch.start(job, "worker on node 1") == 1
    row = lab.row(job)
    assert (row.state, row.attempt, row.started_at) == (JobState.RUNNING, 1, 101.0)
    assert row.attempts == (AttemptRow(1, "worker on node 1", 101.0, None, None, None, 0.0, None),)
    done = lab.end(
        job, 1, Cause.DONE, JobState.DONE, result={"loss": 0.5}, artifact_uri="file:///home/x"
    )
    assert done
    row = lab.row(job)
    assert (row.state, row.cause, row.result) == (JobState.DONE, Cause.DONE, {"loss": 0.5})
    assert (row.artifact_uri, row.ended_at, row.reused_from) == ("file:///home/x", 102.0, None)
    assert row.attempts[0].ended_at == 102.0
    assert row.attempts[0].cause is Cause.DONE


def test_what_a_batch_expects_changes_nothing_but_the_number_of_reads(lab: Any) -> None:
    with lab.batch() as batch:
        batch.move(lab.jobs[0], JobState.CANCELLED)
        batch.expect([*lab.jobs, 10_000])
        assert [batch.start(job, "worker") for job in lab.jobs[1:]] == [1, 1]
        with pytest.raises(LookupError):
            batch.start(10_000, "worker")
    assert lab.row(lab.jobs[0]).state is JobState.CANCELLED


def test_start_and_end_in_one_batch(lab: Any) -> None:
    with lab.batch() as batch:
        for job in lab.jobs:
            attempt = batch.start(job, "worker")
            assert batch.end(job, attempt, Cause.DONE, JobState.DONE, result={"job": job})
    assert lab.store.status(lab.workflow).counts == {JobState.DONE: 3}
    assert [row.result for row in lab.store.load(lab.workflow).jobs] == [
        {"job": job} for job in lab.jobs
    ]
    assert all(lab.row(job).attempts[0].ended_at for job in lab.jobs)


def test_a_retry_gets_the_next_number_and_keeps_the_history(lab: Any) -> None:
    job = lab.jobs[0]
    lab.start(job)
    lab.end(job, 1, Cause.NODE_LOST, JobState.QUEUED, message="node went", lost_seconds=12.5)
    row = lab.row(job)
    assert (row.state, row.cause, row.message) == (JobState.QUEUED, Cause.NODE_LOST, "node went")
    assert lab.start(job) == 2
    row = lab.row(job)
    assert (row.state, row.cause, row.message, row.ended_at) == (JobState.RUNNING, None, None, None)
    first, second = row.attempts
    assert (first.cause, first.message, first.lost_seconds) == (Cause.NODE_LOST, "node went", 12.5)
    assert (second.number, second.ended_at) == (2, None)


def test_an_older_attempt_is_refused_everywhere(lab: Any) -> None:
    job = lab.jobs[0]
    lab.start(job)
    lab.end(job, 1, Cause.NODE_LOST, JobState.QUEUED)
    lab.start(job)
    before = lab.row(job)
    with lab.batch() as batch:
        assert batch.end(job, 1, Cause.DONE, JobState.DONE, result={}) is False
        assert batch.points(job, 1, [("loss", 1, 0.5, 1)]) == 0
        assert batch.checkpoint(job, 1, 10, "file:///old") is False
        assert batch.rewind(job, 1, None) is False
    assert lab.row(job) == before
    assert lab.values(job) == []


def test_an_attempt_ends_once(lab: Any) -> None:
    job = lab.jobs[0]
    attempt = lab.start(job)
    with lab.batch() as batch:
        assert batch.end(job, attempt, Cause.DONE, JobState.DONE, result={"loss": 1.0})
        assert not batch.end(job, attempt, Cause.DONE, JobState.DONE, result={"loss": 2.0})
    assert not lab.end(job, attempt, Cause.DIVERGED, JobState.FAILED)
    row = lab.row(job)
    assert (row.state, row.result, row.ended_at) == (JobState.DONE, {"loss": 1.0}, 102.0)


@pytest.mark.parametrize("attempt", [0, 2, -1])
def test_an_attempt_that_never_was_is_a_bug(lab: Any, attempt: int) -> None:
    job = lab.jobs[0]
    lab.start(job)
    for report in (
        lambda batch: batch.end(job, attempt, Cause.STOPPED, JobState.QUEUED),
        lambda batch: batch.points(job, attempt, []),
        lambda batch: batch.checkpoint(job, attempt, 1, "x"),
        lambda batch: batch.rewind(job, attempt, 1),
    ):
        with pytest.raises(IllegalMove), lab.batch() as batch:
            report(batch)


@pytest.mark.parametrize(
    ("cause", "state", "result"),
    [
        (Cause.DONE, JobState.FAILED, None),
        (Cause.DONE, JobState.DONE, None),
        (Cause.NODE_LOST, JobState.DONE, {}),
        (Cause.NODE_LOST, JobState.QUEUED, {}),
        (Cause.STOPPED, JobState.WAITING, None),
        (Cause.STOPPED, JobState.SKIPPED, None),
        (Cause.STOPPED, JobState.RUNNING, None),
    ],
)
def test_an_end_that_makes_no_sense_is_a_bug(
    lab: Any, cause: Cause, state: JobState, result: Any
) -> None:
    job = lab.jobs[0]
    attempt = lab.start(job)
    before = lab.row(job)
    with pytest.raises(IllegalMove):
        lab.end(job, attempt, cause, state, result=result)
    assert lab.row(job) == before


def bring(lab: Any, job: int, state: JobState) -> None:
    """Take a fresh (QUEUED) job to `state` by legal moves."""
    ends = {JobState.DONE: (Cause.DONE, {}), JobState.FAILED: (Cause.USER_ERROR, None)}
    with lab.batch() as batch:
        if state in (JobState.RUNNING, *ends):
            attempt = batch.start(job, "worker")
            if state in ends:
                cause, result = ends[state]
                batch.end(job, attempt, cause, state, result=result)
        elif state is not JobState.QUEUED:
            batch.move(job, JobState.CANCELLED)
            if state is not JobState.CANCELLED:
                batch.move(job, JobState.WAITING)
            if state is JobState.SKIPPED:
                batch.move(job, JobState.SKIPPED)


def test_every_move_is_allowed_or_a_bug(lab: Any, new_job: Any) -> None:
    jobs = [new_job(f"{a}-{b}") for a in JobState for b in JobState]
    workflow = lab.store.create_workflow("moves", "", {}, jobs, 100.0)
    lab.lease, lab.workflow = lab.store.claim(workflow, "controller", 30.0, 100.0), workflow
    for job in lab.store.load(workflow).jobs:
        here, there = (JobState(word) for word in job.name.split("-"))
        bring(lab, job.id, here)
        before = lab.row(job.id)
        assert before.state is here
        by_move = there in MOVES[here] and JobState.RUNNING not in (here, there)
        if by_move:
            with lab.batch() as batch:
                batch.move(job.id, there)
            assert lab.row(job.id).state is there
        else:
            with pytest.raises(IllegalMove), lab.batch() as batch:
                batch.move(job.id, there)
            assert lab.row(job.id) == before


@pytest.mark.parametrize("state", [s for s in JobState if s is not JobState.QUEUED])
def test_only_a_queued_job_starts(lab: Any, state: JobState) -> None:
    bring(lab, lab.jobs[0], state)
    with pytest.raises(IllegalMove, match=f"is {state} and cannot become running"):
        lab.start(lab.jobs[0])


def test_another_chance_forgets_how_it_ended(lab: Any) -> None:
    job = lab.jobs[0]
    lab.start(job)
    lab.end(job, 1, Cause.OUT_OF_MEMORY, JobState.FAILED, message="17 GiB")
    assert lab.row(job).ended_at == 102.0
    with lab.batch() as batch:
        batch.move(job, JobState.QUEUED)
    row = lab.row(job)
    assert (row.state, row.cause, row.message, row.ended_at) == (JobState.QUEUED, None, None, None)
    assert row.attempts[0].cause is Cause.OUT_OF_MEMORY


def test_reuse_makes_a_job_done_without_an_attempt(lab: Any, new_job: Any) -> None:
    job = lab.jobs[0]
    lab.start(job)
    lab.end(job, 1, Cause.DONE, JobState.DONE, result={"loss": 0.5}, artifact_uri="file:///x")
    identity = lab.row(job).identity
    copies = [
        new_job("copy", identity=identity),
        new_job("late", identity=identity, needs=("copy",)),
    ]
    second = lab.store.create_workflow("second", "", {}, copies, 200.0)
    lease = lab.store.claim(second, "controller", 30.0, 200.0)
    found = lab.store.finished([identity])
    assert found == {identity: FinishedJob(job, lab.workflow, {"loss": 0.5}, "file:///x", 102.0)}
    with lab.store.batch(lease, 201.0) as batch:
        for row in lab.store.load(second).jobs:
            batch.reuse(row.id, found[identity])
    for row in lab.store.load(second).jobs:
        assert (row.state, row.attempt, row.attempts) == (JobState.DONE, 0, ())
        assert (row.result, row.artifact_uri) == ({"loss": 0.5}, "file:///x")
        assert (row.reused_from, row.ended_at) == (job, 201.0)
    assert lab.store.finished([identity]) == found


@pytest.mark.parametrize("state", sorted(set(JobState) - REUSABLE))
def test_only_a_job_that_has_not_begun_reuses(lab: Any, state: JobState) -> None:
    bring(lab, lab.jobs[0], state)
    with pytest.raises(IllegalMove), lab.batch() as batch:
        batch.reuse(lab.jobs[0], FinishedJob(lab.jobs[1], lab.workflow, {}, None, 0.0))


def test_results_and_messages_survive_whatever_they_hold(lab: Any) -> None:
    one, two, _ = lab.jobs
    result = {"nan": math.nan, "up": math.inf, "down": -math.inf, "text": "\0 \ud800 ü", "n": 2**80}
    lab.finish(one, **result)
    stored = lab.row(one).result
    assert math.isnan(stored.pop("nan"))
    assert stored == {key: value for key, value in result.items() if key != "nan"}
    lab.start(two, worker="a\0b")
    lab.end(two, 1, Cause.USER_ERROR, JobState.FAILED, message="bad \0 byte, bad \ud800 text\nline")
    assert lab.row(two).message == "bad \ufffd byte, bad ? text\nline"
    assert lab.row(two).attempts[0].worker == "a\ufffdb"


def test_events_keep_their_order_and_data(lab: Any) -> None:
    job = lab.jobs[0]
    with lab.batch() as batch:
        batch.event("claimed", data={"owner": "me"})
        attempt = batch.start(job, "worker")
        batch.event("started", job, attempt)
    with lab.batch() as batch:
        batch.event("note")
    events = lab.store.events(lab.workflow)
    assert [(e.kind, e.job_id, e.attempt, e.data, e.at) for e in events] == [
        ("claimed", None, None, {"owner": "me"}, 101.0),
        ("started", job, 1, {}, 101.0),
        ("note", None, None, {}, 102.0),
    ]
    assert [e.kind for e in lab.store.events(lab.workflow, after=events[1].id)] == ["note"]


def test_what_mlflow_holds_is_remembered(lab: Any) -> None:
    job = lab.jobs[0]
    with lab.batch() as batch:
        batch.mirrored(job)
        batch.mirrored(job, step=10)
        batch.mirrored(job, state=JobState.QUEUED)
    row = lab.row(job)
    assert (row.mirrored_step, row.mirrored_state) == (10, JobState.QUEUED)


def test_everything_is_there_after_opening_again(lab: Any, store_url: str) -> None:
    lab.finish(lab.jobs[0], loss=0.5)
    before = lab.store.load(lab.workflow)
    lab.store.close()
    with Store.open(store_url, read_only=True) as again:
        assert again.load(lab.workflow) == before
