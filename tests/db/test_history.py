"""What a plan reads of finished jobs."""

from __future__ import annotations

from typing import Any

from kvlab.db.history import Done
from kvlab.db.rows import FinishedJob
from kvlab.db.states import Cause, JobState


def test_done_lists_the_newest_finished_jobs_with_their_seconds(lab: Any) -> None:
    one, two, three = lab.jobs
    lab.finish(two)
    lab.start(one)
    with lab.batch() as batch:
        batch.reuse(three, FinishedJob(two, lab.workflow, {}, None, 0.0))
    spec = {"sleep": 0.0, "points": 3, "fail": None}
    expected = [
        Done(lab.workflow, "c", "noop", spec, {}, {"cpus": 1}, None),
        Done(lab.workflow, "b", "noop", spec, {}, {"cpus": 1}, 1.0),
    ]
    assert lab.store.done(10) == expected
    assert lab.store.done(1) == expected[:1]


def test_previous_gives_the_parts_of_each_cells_newest_result(lab: Any, new_job: Any) -> None:
    lab.finish(lab.jobs[0])
    lab.start(lab.jobs[1])
    lab.end(lab.jobs[1], 1, Cause.USER_ERROR, JobState.FAILED)
    assert lab.store.previous("study") == {"a": {"spec": "aa", "source": "bb"}}
    jobs = [new_job("a", parts={"spec": "zz"}), new_job("d", parts={"spec": "dd"})]
    for name in ("study", "another"):
        lab.workflow = lab.store.create_workflow(name, "", {}, jobs, 200.0)
        lab.lease = lab.store.claim(lab.workflow, "controller", 30.0, 200.0)
        lab.finish(lab.store.load(lab.workflow).jobs[0].id)
    assert lab.store.previous("study") == {"a": {"spec": "zz"}}
    assert lab.store.previous("nothing") == {}


def test_have_knows_what_has_a_result_of_its_own(lab: Any) -> None:
    one, two, three = lab.jobs
    identities = [lab.row(job).identity for job in lab.jobs]
    lab.finish(one)
    lab.start(two)
    assert lab.store.have([*identities, identities[0], "unknown"]) == {identities[0]}
    assert lab.store.have(str(n) for n in range(12_000)) == set()
    with lab.batch() as batch:
        batch.reuse(three, FinishedJob(one, lab.workflow, {}, None, 0.0))
    assert lab.store.have(identities) == {identities[0]} == set(lab.store.finished(identities))


def test_a_void_measurement_is_not_found_again(lab: Any) -> None:
    one, two, three = lab.jobs
    identities = [lab.row(job).identity for job in lab.jobs]
    lab.finish(one, gates={"alone": False, "repeats_enough": True})
    lab.finish(two, gates={"alone": True, "repeats_enough": False}, settled=["repeats_enough"])
    lab.finish(three, gates={"alone": True, "repeats_enough": True})
    assert lab.store.have(identities) == set(identities[1:]) == set(lab.store.finished(identities))
