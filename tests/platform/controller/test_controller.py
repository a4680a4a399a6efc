"""The controller on a real Ray: what runs, what runs again, and what does not."""

from __future__ import annotations

import threading
import time

import pytest

from kvlab import KvlabError
from kvlab.db.errors import Held, LeaseLost
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.controller.controller import Controller
from kvlab.platform.graph import Resources

pytestmark = pytest.mark.ray

SOON = 30.0


def until(condition):
    """Poll a real process."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def causes(job):
    return [attempt.cause for attempt in job.attempts]


@pytest.fixture
def beside(store, home, pool):
    """Run a stored workflow in a thread; return the controller and what ends with its outcome."""

    def start(number):
        controller = Controller(home, store, number, pool=pool)
        found = []

        def work():
            try:
                found.append(controller.run())
            except KvlabError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()

        def join():
            thread.join(SOON)
            assert not thread.is_alive()
            return found[0]

        return controller, join

    return start


def test_a_graph_runs_in_order(run, cell, store):
    outcome, jobs = run(cell("a", points=5), cell("b", "a"), cell("c", "a"), cell("d", "b", "c"))
    assert outcome.state is WorkflowState.DONE
    assert outcome.counts == {JobState.DONE: 4}
    assert jobs["d"].started_at >= max(jobs[name].ended_at for name in "bc")
    assert [(p.step, p.value) for p in store.points(jobs["a"].id)] == [
        (step, step - 1.0) for step in range(1, 6)
    ]
    ends = [event for event in store.events(1) if event.kind == "attempt_ended"]
    assert len(ends) == 4


def test_a_failure_skips_what_needs_it_and_nothing_else(run, cell):
    outcome, jobs = run(
        cell("bad", fail="user"), cell("below", "bad"), cell("further", "below"), cell("other")
    )
    assert outcome.state is WorkflowState.FAILED
    assert {name: job.state for name, job in jobs.items()} == {
        "bad": JobState.FAILED,
        "below": JobState.SKIPPED,
        "further": JobState.SKIPPED,
        "other": JobState.DONE,
    }


@pytest.mark.parametrize(
    ("fail", "cause", "attempts"),
    [
        ("nan", Cause.DIVERGED, 1),
        ("user", Cause.USER_ERROR, 1),
        ("oom", Cause.OUT_OF_MEMORY, 2),
        ("exit", Cause.NODE_LOST, 3),
    ],
)
def test_retries_go_by_cause(run, cell, fail, cause, attempts):
    retries = {Cause.OUT_OF_MEMORY: 1, Cause.NODE_LOST: 2}
    outcome, jobs = run(cell("a", fail=fail, retries=retries), cell("other"))
    assert outcome.state is WorkflowState.FAILED
    assert causes(jobs["a"]) == [cause] * attempts
    assert jobs["a"].state is JobState.FAILED
    assert jobs["a"].message
    assert jobs["other"].state is JobState.DONE


def test_a_job_past_its_time_out_is_ended(run, cell):
    outcome, jobs = run(cell("slow", sleep=60.0, timeout=0.3), cell("other"))
    assert outcome.state is WorkflowState.FAILED
    assert causes(jobs["slow"]) == [Cause.TIMED_OUT]
    assert jobs["slow"].attempts[0].lost_seconds >= 0.3
    assert jobs["other"].state is JobState.DONE


def test_finished_jobs_of_other_workflows_are_reused(run, cell):
    _, before = run(cell("a", points=2), cell("b", "a"))
    outcome, after = run(cell("a", points=2), cell("b", "a"), cell("c", "b"))
    assert outcome.state is WorkflowState.DONE
    assert after["a"].reused_from == before["a"].id
    assert after["b"].reused_from == before["b"].id
    assert after["a"].result == before["a"].result
    assert after["a"].attempts == ()
    assert after["c"].reused_from is None


def test_an_artifact_that_is_gone_is_made_again(run, cell, home):
    _, before = run(cell("a", publish=True))
    folder = home.artifact("identity-of-a")
    assert before["a"].artifact_uri == str(folder)
    (folder / "noop.json").unlink()
    folder.rmdir()
    _, after = run(cell("a", publish=True))
    assert after["a"].reused_from is None
    assert (folder / "noop.json").exists()


def test_stop_lets_jobs_checkpoint_and_resume_goes_on(beside, run, submit, cell, store, home):
    number = submit(cell("a", sleep=8.0, points=80, checkpoints=5), cell("b", "a"))
    controller, join = beside(number)
    until(lambda: store.load(number).jobs[0].checkpoint is not None)
    controller.stop()
    assert join().state is WorkflowState.STOPPED
    stopped = store.load(number).jobs[0]
    assert causes(stopped) == [Cause.STOPPED]
    assert stopped.state is JobState.QUEUED
    outcome, jobs = run(number)
    assert outcome.state is WorkflowState.DONE
    assert jobs["a"].result["started_from"] == stopped.checkpoint.step
    assert [point.step for point in store.points(jobs["a"].id)] == list(range(1, 81))
    assert list((home.root / "checkpoints").iterdir()) == []
    assert list((home.root / "spool").iterdir()) == []


def test_a_second_stop_does_not_wait(beside, submit, cell, store):
    number = submit(cell("a", sleep=60.0))
    controller, join = beside(number)
    until(lambda: store.status(number).jobs[0].state is JobState.RUNNING)
    controller.stop()
    controller.stop()
    assert join().state is WorkflowState.STOPPED


def test_cancel_ends_everything_and_resume_takes_it_up(beside, run, submit, cell, store):
    number = submit(cell("a", sleep=2.0), cell("b", "a"))
    _, join = beside(number)
    until(lambda: store.status(number).jobs[0].state is JobState.RUNNING)
    store.request(number, "cancel")
    assert join().state is WorkflowState.CANCELLED
    assert {job.state for job in store.status(number).jobs} == {JobState.CANCELLED}
    assert run(number)[0].state is WorkflowState.DONE


def test_a_second_controller_is_refused(beside, submit, cell, store, home, pool):
    number = submit(cell("a", sleep=60.0))
    controller, join = beside(number)
    until(lambda: store.status(number).jobs[0].state is JobState.RUNNING)
    with pytest.raises(Held, match="is being run by"):
        Controller(home, store, number, pool=pool).run()
    controller.cancel()
    assert join().state is WorkflowState.CANCELLED


def test_a_controller_that_lost_its_lease_stops_itself(beside, submit, cell, store):
    number = submit(cell("a", sleep=60.0))
    _, join = beside(number)
    until(lambda: store.status(number).jobs[0].state is JobState.RUNNING)
    store.claim(number, "thief", 60.0, time.time() + 3600.0)
    assert isinstance(join(), LeaseLost)


def test_what_fits_no_node_is_refused_before_anything_runs(run, cell, store):
    with pytest.raises(KvlabError, match=r"job 'big' asks for 64 CPUs"):
        run(cell("a"), cell("big", resources=Resources(cpus=64)))
    assert {job.state for job in store.status(1).jobs} == {JobState.QUEUED}


def test_an_exclusive_job_is_alone(run, cell):
    cells = [cell(f"small{one}", sleep=0.3) for one in range(4)]
    _, jobs = run(cell("alone", sleep=0.3, resources=Resources(exclusive=True)), *cells)
    alone = jobs.pop("alone")
    for job in jobs.values():
        assert job.ended_at <= alone.started_at or job.started_at >= alone.ended_at


def test_shapes_take_turns_on_the_same_cpus(run, cell):
    shapes = [Resources(cpus=cpus) for cpus in (1, 4, 2, 3)]
    cells = [cell(f"job{n}", resources=shape) for n, shape in enumerate(shapes)]
    outcome, _ = run(*cells)
    assert outcome.state is WorkflowState.DONE


def test_jobs_are_taken_back_from_behind_one_that_is_long(run, cell):
    quick = [cell(f"quick{n}") for n in range(30)]
    long = [cell(f"long{n}", sleep=1.0) for n in range(8)]
    outcome, jobs = run(*quick, *long)
    assert outcome.state is WorkflowState.DONE
    for job in jobs.values():
        *early, last = causes(job)
        assert last is Cause.DONE
        assert set(early) <= {Cause.STOPPED}
        assert all(attempt.lost_seconds == 0 for attempt in job.attempts)


def test_a_person_is_told_of_no_more_running_jobs_than_there_are_workers(
    store, home, pool, submit, cell
):
    quick = [cell(f"quick{n}") for n in range(30)]
    long = [cell(f"long{n}", sleep=1.5) for n in range(6)]
    number = submit(*quick, *long)
    controller = Controller(home, store, number, pool=pool)
    assert controller.run().state is WorkflowState.DONE
    given_back = [job for job in store.load(number).jobs if job.attempt > 1]
    running = set()
    for change in controller.snapshot().changes:
        if change.state is JobState.RUNNING:
            assert change.name not in running
            running.add(change.name)
            assert len(running) <= 4
        else:
            assert change.state is JobState.DONE, change
            running.discard(change.name)
            if change.name.startswith("long"):
                assert 1.4 < change.seconds < 3.0
    assert not running
    assert given_back


def test_jobs_behind_one_that_dies_are_not_charged(run, cell):
    cells = [cell(f"quick{n}") for n in range(30)]
    cells[20] = cell("dies", fail="exit")
    outcome, jobs = run(*cells)
    assert outcome.counts == {JobState.DONE: 29, JobState.FAILED: 1}
    assert causes(jobs["dies"]) == [Cause.NODE_LOST]


def test_lost_work_is_counted_from_the_last_checkpoint(run, cell):
    retries = {Cause.NODE_LOST: 1}
    _, jobs = run(
        cell("a", sleep=3.0, points=30, checkpoints=10, fail="exit", fail_at=25, retries=retries)
    )
    first = jobs["a"].attempts[0]
    assert first.cause is Cause.NODE_LOST
    assert 0.0 < first.lost_seconds < first.ended_at - first.started_at
    assert jobs["a"].attempts[1].from_step in (10, 20)
