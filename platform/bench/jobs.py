"""200 jobs that do nothing, through the real controller, pool and SQLite; beside Ray Tune."""

from __future__ import annotations

import os
import tempfile
from time import perf_counter

from kvlab.db.states import JobState
from kvlab.db.store import Store
from kvlab.platform.bench.line import Line, middle
from kvlab.platform.bench.tune import trial_rate
from kvlab.platform.controller.controller import Controller
from kvlab.platform.controller.launch import submit
from kvlab.platform.controller.local import local_ray
from kvlab.platform.controller.pool import Pool
from kvlab.platform.home import Home
from kvlab.platform.spec.read import load_graph

JOBS = 200
REPEATS = 3
WORKFLOW = """version: 1
name: bench
seeds: [{seeds}]
jobs:
  work: {{noop: {{}}}}
"""


def run() -> list[Line]:
    """Median of three rounds each, after one to warm up, on one Ray with as many CPUs as cores."""
    concurrency = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, local_ray(concurrency):
        ours, missing = job_rates(Home.find(folder))
        theirs = [trial_rate(JOBS, concurrency) for _ in range(REPEATS + 1)][1:]
    void = "" if not missing else f"{missing} jobs have no ended attempt in the store"
    if failed := sum(JOBS - ended for _, ended in theirs):
        void = f"{failed} trials of Ray Tune did not end well"
    rates = [rate for rate, _ in theirs]
    steady = [rate for rate, _ in ours]
    return [
        Line(
            f"{JOBS} no-op jobs, {concurrency} at a time",
            "jobs/s",
            middle(steady),
            middle(rates),
            beside="Ray Tune, reuse_actors, no callbacks",
            least_ratio=20.0,
            void=void,
            detail={"ours": steady, "theirs": rates, "ours_whole": [whole for _, whole in ours]},
        )
    ]


def job_rates(home: Home) -> tuple[list[tuple[float, float]], int]:
    """Jobs per second of each round: from the first end that was stored to the last, as the other
    side is measured; and of the whole, storing the workflow and closing it included.

    Returns:
        the rates, and how many jobs lack what `kvlab status` and `logs` show of a job that ran.
    """
    home.create()
    pool = Pool(home)
    rates: list[tuple[float, float]] = []
    missing = 0
    try:
        with Store.open(home.url) as store:
            for repeat in range(REPEATS + 1):
                # Seeds of its own, since a finished job would be reused.
                seeds = range(repeat * JOBS, (repeat + 1) * JOBS)
                graph = load_graph(WORKFLOW.format(seeds=", ".join(map(str, seeds))))
                start = perf_counter()
                number = submit(store, graph, pool.slots)
                Controller(home, store, number, pool=pool).run()
                whole = JOBS / (perf_counter() - start)
                ends = ended(store, number)
                # The first commit stores several ends: they are not counted, its moment is.
                later = sum(end > min(ends) for end in ends)
                rates.append((later / (max(ends) - min(ends)), whole))
                missing += JOBS - len(ends)
    finally:
        pool.close()
    return rates[1:], missing


def ended(store: Store, workflow: int) -> list[float]:
    """When each job ended that is done by one attempt whose beginning and end are told."""
    told = {event.job_id for event in store.events(workflow) if event.kind == "attempt_ended"}
    return [
        end
        for job in store.load(workflow).jobs
        if job.state is JobState.DONE and len(job.attempts) == 1 and job.id in told
        if (end := job.attempts[0].ended_at) is not None
    ]
