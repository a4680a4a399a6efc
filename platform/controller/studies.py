"""Studies: jobs that the controller does itself, by running the jobs of trial after trial.

A trial's jobs are rows like any others, stored in one batch with the event that says which point
they try. What became of a trial is an event too, so a study is rebuilt from its events.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.batches import Batch
from kvlab.db.errors import StoreError
from kvlab.db.rows import FinishedJob, JobRow, fresh
from kvlab.db.states import TERMINAL, Cause, JobState
from kvlab.db.store import Store
from kvlab.platform.controller.attempts import Attempts
from kvlab.platform.controller.jobs import Jobs, new_job, usable
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.controller.winners import Winners, first_points, trials_of
from kvlab.platform.graph import Cell
from kvlab.platform.home import Home
from kvlab.platform.jobs import KINDS
from kvlab.platform.search.rows import TRIAL
from kvlab.platform.search.trials import FROM
from kvlab.platform.search.watch import POINT
from kvlab.platform.spec.deferred import DEFERRED
from kvlab.platform.worker.causes import classify

if TYPE_CHECKING:
    from kvlab.platform.search.study import Data, Study, StudyView

KIND = "search"
"""The kind of job that is a study."""
WORKER = "controller"
LOOK_SECONDS = 0.05
"""How often a study is looked at that waits for its sampler."""
CURVE_SECONDS = 1.0
"""How often the learning curves of its trials are."""
PRUNED = "pruned: others were better at the same step"

Reuse = Callable[[int, FinishedJob, float], None]


@dataclass(slots=True)
class Active:
    """A study under way, and the jobs of each trial that are not all over.

    Attributes:
        adding: trials whose jobs are not stored yet. pruned: trials that were stopped.
        look_at: when learning curves are looked at again. seen: job -> the last step of its curve.
    """

    row: JobRow
    attempt: int
    study: Study
    running: dict[str, list[int]] = field(default_factory=dict)
    adding: int = 0
    pruned: set[str] = field(default_factory=set)
    look_at: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)


class Studies:
    """All studies of a workflow. Gathers rows and deeds in the ledger, as `Attempts` does."""

    def __init__(
        self,
        home: Home,
        store: Store,
        workflow: int,
        jobs: Jobs,
        schedule: Schedule,
        attempts: Attempts,
        ledger: Ledger,
        reuse: Reuse,
    ) -> None:
        self._home, self._store, self._workflow = home, store, workflow
        self._jobs, self._schedule, self._attempts = jobs, schedule, attempts
        self._ledger, self._reuse = ledger, reuse
        self._winners = Winners(jobs, schedule, ledger)
        self._active: dict[int, Active] = {}
        self._fetching: set[int] = set()
        """Studies that are done elsewhere, whose winner's jobs are about to join this workflow."""
        self._past: dict[int, dict[str, Data]] = {}
        """Study -> trial -> what is stored of it."""
        if any(row.kind == KIND for row in jobs.rows.values()):
            for event in store.events(workflow):
                if event.kind == TRIAL and event.job_id is not None:
                    past = self._past.setdefault(event.job_id, {})
                    past[str(event.data["number"])] = event.data
        for job, past in self._past.items():
            if jobs[job].state is JobState.FAILED:  # its trials have another chance
                for number, data in past.items():
                    if data["state"] == "failed":
                        past[number] = {**data, "state": "running"}

    def of_trials(self) -> set[int]:
        """The jobs that belong to a trial."""
        return {row.id for row in self._jobs.rows.values() if "/" in row.job}

    def settled(self) -> set[int]:
        """The jobs of trials that are over: nothing more becomes of them."""
        over = {
            f"{self._jobs[study].name}/{number}"
            for study, trials in self._past.items()
            for number, data in trials.items()
            if data["state"] != "running"
        }
        return {row.id for row in self._jobs.rows.values() if row.job.rpartition("/")[0] in over}

    def interrupted(self, now: float) -> None:
        """End the attempts of studies that ran when a controller died; they begin again."""
        for row in self._jobs.rows.values():
            if row.kind == KIND and self._schedule.state(row.id) is JobState.RUNNING:
                self._end(row.id, row.attempt, Cause.STOPPED, now, "its controller died")

    def tick(self, now: float) -> None:
        """Begin what can begin, and take every study a step on."""
        resolved: list[int] = []
        for job in self._schedule.inline():
            row = self._jobs[job]
            if row.kind != KIND:
                resolved += self._resolved(job, now)
            elif job not in self._fetching:
                attempt = self._started(job, now)
                try:
                    self._begin(job, attempt, now)
                except Exception as error:
                    self._failed(job, attempt, now, error)
        self._reuse_finished(resolved)
        for active in list(self._active.values()):
            if active.adding:
                continue
            try:
                self._advance(active, now)
            except StoreError:
                continue  # it reads again in the next tick
            except Exception as error:
                self._drop(active)
                self._failed(active.row.id, active.attempt, now, error)

    def takes(self, job: int, found: FinishedJob) -> bool:
        """Have what another workflow's study found, with which this job is to be done.

        Returns:
            False where the winner's jobs have to join this workflow first; then it is reused.
        """
        waiting = any(DEFERRED in other.spec for other in self._jobs.rows.values())
        if not waiting or found.result["best"] is None:
            return True
        try:
            cells = self._winners.lacking(self._jobs[job], found.result)
        except Exception:
            return True  # the jobs that build on it fail, and say why
        if not cells:
            return True
        ids: list[int] = []
        self._fetching.add(job)

        def write(batch: Batch) -> None:
            ids[:] = batch.add([new_job(cell) for cell in cells])

        def joined() -> None:
            self._joined(ids, cells)
            self._reuse(job, found, time.time())

        self._ledger.row(write)
        self._ledger.then(joined)
        return False

    def due(self, now: float) -> float | None:
        """When the next `tick` may have something to do that no message announces."""
        return now + LOOK_SECONDS if self._active else None

    def end_all(self, cause: Cause, now: float) -> None:
        """End all studies; with STOPPED they go on another time."""
        for active in list(self._active.values()):
            self._leave(active, cause, now)

    def close(self) -> None:
        """Leave every sampler."""
        for active in self._active.values():
            active.study.close()

    def views(self) -> tuple[StudyView, ...]:
        """How each study stands. Any thread."""
        return tuple(active.study.view() for active in list(self._active.values()))

    def _begin(self, job: int, attempt: int, now: float) -> None:
        from kvlab.platform.search.study import Study

        row = self._jobs[job]
        past = self._past.setdefault(job, {})
        first = first_points(row, self._jobs)
        study = Study(row.spec, trials_of(row, self._jobs), past, first)
        if FROM in row.parents:
            said = f"{len(first)} of {row.spec['promote']} points promoted from {row.parents[FROM]}"
            self._jobs.tell(job, attempt, JobState.RUNNING, note=said)
        active = self._active[job] = Active(row, attempt, study)
        for number, data in past.items():
            of_it = list(self._of_trial(row.name, number))
            if data["state"] == "running":
                active.running[number] = of_it
                study.watched(number)
            elif study.watch is not None and data["state"] == "complete" and of_it:
                study.watched(number)  # a measure for others, as it was
                active.running[number] = of_it
                self._watch(active, number, now)
                del active.running[number]
                study.watch.ended(int(number), complete=True)

    def _resolved(self, job: int, now: float) -> list[int]:
        """Say what a ready job is that waited for a winner; where it cannot be, it has failed."""
        found: list[int] = []
        if DEFERRED not in self._jobs[job].spec:
            return found  # one that it stands beside came first
        try:
            for one in self._winners.resolve(job):
                found.append(one)
        except Exception as error:
            self._failed(job, self._started(job, now), now, error)
        return found

    def _of_trial(self, study: str, number: str) -> Iterator[int]:
        for row in self._jobs.rows.values():
            if row.job.rpartition("/")[0] == f"{study}/{number}":
                yield row.id

    def _advance(self, active: Active, now: float) -> None:
        study = active.study
        for number, jobs in list(active.running.items()):
            if all(self._schedule.state(job) in TERMINAL for job in jobs):
                self._judge(active, number)
        if study.watch is not None and now >= active.look_at:
            active.look_at = now + CURVE_SECONDS
            for number in list(active.running):
                self._watch(active, number, now)
        for data in study.repeats():
            self._note(active, data)
        while (trial := study.next(set(active.running))) is not None:
            self._run(active, trial.number, trial.cells, trial.data)
        if not active.running and study.over:
            self._leave(active, Cause.DONE, now, study.result())

    def _watch(self, active: Active, number: str, now: float) -> None:
        """Take in what a trial's first seed has logged; stop the trial where that is enough."""
        watch, jobs = active.study.watch, active.running[number]
        if watch is None or not number.isdigit() or number in active.pruned:
            return
        first = active.row.spec["arms"][0]["seed"]
        for job in jobs:
            row = self._jobs[job]
            if not KINDS[row.kind].produces_model or row.axes.get("seed") != first:
                continue
            points = self._store.points(job, [POINT], after_step=active.seen.get(job))
            if points:
                active.seen[job] = points[-1].step
            curve = [(point.step, point.value) for point in points]
            over = self._schedule.state(job) in TERMINAL
            if watch.report(int(number), curve) and not over:
                active.pruned.add(number)
                self._stop(jobs, now)
                return

    def _stop(self, jobs: Sequence[int], now: float) -> None:
        """End all jobs of a trial, as far as they have not ended."""
        end = {"cause": Cause.CANCELLED, "message": PRUNED}
        for job in jobs:
            if job in self._attempts.running:
                self._attempts.end(job, end, now, kill=True)
            else:
                self._attempts.moved(self._schedule.withdraw(job))

    def _judge(self, active: Active, number: str) -> None:
        if active.study.watch is not None:  # all that it logged, before it is a measure for others
            self._watch(active, number, time.time())
        jobs = active.running[number]
        done = [job for job in jobs if self._schedule.state(job) is JobState.DONE]
        failure = None if len(done) == len(jobs) else self._why(jobs)
        pruned = number in active.pruned
        found = [self._jobs.done(job) for job in done]
        data = active.study.judge(number, found, PRUNED if pruned else failure, pruned=pruned)
        if data is None:
            return
        del active.running[number]
        self._note(active, data)
        name, attempt = active.row.id, active.attempt
        if said := active.study.shown(number):
            self._jobs.tell(name, attempt, JobState.RUNNING, note=said)
        if warning := active.study.hopeless():
            self._jobs.tell(name, attempt, JobState.RUNNING, note=warning)

    def _run(self, active: Active, number: str, cells: Sequence[Cell], data: Data) -> None:
        """Store the jobs of a trial; they run once they are stored."""
        ids = active.running[number] = []
        active.adding += 1
        job, attempt = active.row.id, active.attempt
        self._past[job][number] = data

        def write(batch: Batch) -> None:
            batch.event(TRIAL, job, attempt, data)
            ids[:] = batch.add([new_job(cell) for cell in cells])

        self._ledger.row(write)
        self._ledger.then(lambda: self._added(active, ids, cells))

    def _added(self, active: Active, ids: Sequence[int], cells: Sequence[Cell]) -> None:
        active.adding -= 1
        self._joined(ids, cells)

    def _joined(self, ids: Sequence[int], cells: Sequence[Cell]) -> None:
        """Jobs were stored: take them in, and reuse what others did."""
        rows = [fresh(job, new_job(cell)) for job, cell in zip(ids, cells, strict=True)]
        self._jobs.add(rows)
        states = {row.id: row.state for row in rows}
        self._attempts.moved(self._schedule.add([self._jobs.task(row) for row in rows], states))
        self._reuse_finished(row.id for row in rows)

    def _reuse_finished(self, jobs: Iterable[int]) -> None:
        """What these jobs are is known by now: perhaps others have done them."""
        identities = {job: self._jobs[job].identity for job in jobs}
        if not identities:
            return
        try:
            finished = self._store.finished(identities.values())
        except StoreError:
            return  # then they run
        for job, identity in identities.items():
            found = finished.get(identity)
            if found is not None and usable(found):
                self._reuse(job, found, time.time())

    def _note(self, active: Active, data: Data) -> None:
        job, attempt = active.row.id, active.attempt
        self._past[job][str(data["number"])] = data
        self._ledger.row(lambda batch: batch.event(TRIAL, job, attempt, data))

    def _why(self, jobs: Sequence[int]) -> str:
        """What the first job that failed said."""
        for job in jobs:
            message = self._jobs.facts.get(job, {}).get("message") or self._jobs[job].message
            if message and self._schedule.state(job) is not JobState.DONE:
                return f"{self._jobs[job].name}: {str(message).strip().splitlines()[0]}"
        return "its jobs did not finish"

    def _leave(self, active: Active, cause: Cause, now: float, result: Any = None) -> None:
        self._drop(active)
        self._end(active.row.id, active.attempt, cause, now, None, result)

    def _drop(self, active: Active) -> None:
        del self._active[active.row.id]
        active.study.close()

    def _started(self, job: int, now: float) -> int:
        attempt = self._schedule.started(job, now)
        self._ledger.row(partial(Batch.start, job_id=job, worker=WORKER), job, "start")
        self._jobs.note(job, attempt, JobState.RUNNING, started_at=now, ended_at=None)
        return attempt

    def _failed(self, job: int, attempt: int, now: float, error: Exception) -> None:
        """An attempt ends for a person's mistake; for ours too, which the job's log tells of."""
        message = str(error)
        if not isinstance(error, KvlabError):
            message = classify(error)[1]
            log = self._home.log(self._workflow, self._jobs[job].name, attempt)
            with suppress(OSError):
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        self._end(job, attempt, Cause.USER_ERROR, now, message)

    def _end(
        self,
        job: int,
        attempt: int,
        cause: Cause,
        now: float,
        message: str | None,
        result: dict[str, Any] | None = None,
    ) -> None:
        verdict = self._schedule.ended(job, cause, now)
        state = verdict.state
        self._ledger.row(
            lambda batch: batch.end(job, attempt, cause, state, result, None, message), job, "end"
        )
        self._jobs.note(
            job, attempt, state, ended_at=now, cause=cause, message=message, result=result
        )
        self._attempts.moved(verdict.moves)
