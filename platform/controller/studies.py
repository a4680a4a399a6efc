"""Studies: jobs that the controller does itself, by running the jobs of trial after trial.

A trial's jobs are rows like any others, stored in one batch with the event that says which point
they try. What became of a trial is an event too, so a study is rebuilt from its events.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.batches import Batch
from kvlab.db.rows import FinishedJob, JobRow, fresh
from kvlab.db.states import TERMINAL, Cause, JobState
from kvlab.db.store import Store
from kvlab.platform.controller.attempts import Attempts
from kvlab.platform.controller.jobs import Jobs, new_job, usable
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.controller.snapshot import StudyView
from kvlab.platform.graph import Cell
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.search.outcome import Done, Measured, excess, limit_text, measured

if TYPE_CHECKING:
    from kvlab.platform.search.broker import Broker
    from kvlab.platform.search.rows import Row
    from kvlab.platform.search.trials import Trials

TRIAL, KIND = "trial", "search"
"""The kind of a trial's events, and of the job that they belong to."""
WORKER = "controller"
LOOK_SECONDS = 0.05
"""How often a study is looked at that waits for its sampler."""
HOPELESS = 10
"""Trials that all miss a constraint before a person is told."""

Reuse = Callable[[int, FinishedJob, float], None]


@dataclass(slots=True)
class Study:
    """One study under way.

    Attributes:
        jobs: trial -> its jobs, while they are not all over; "baseline" is one.
        base: what the baseline measured; None: not known yet.
        told: trial -> what is stored of it beside its row.
    """

    row: JobRow
    attempt: int
    broker: Broker
    trials: Trials
    jobs: dict[str, list[int]] = field(default_factory=dict)
    base: dict[str, Measured] | None = None
    told: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.row.spec

    @property
    def metrics(self) -> list[str]:
        limits = [limit["metric"] for limit in self.spec["constraints"]]
        return list(dict.fromkeys((*self.spec["objectives"], *limits)))


class Studies:
    """All studies of a workflow. Gathers rows and deeds in the ledger, as `Attempts` does."""

    def __init__(
        self,
        store: Store,
        workflow: int,
        jobs: Jobs,
        schedule: Schedule,
        attempts: Attempts,
        ledger: Ledger,
        reuse: Reuse,
    ) -> None:
        self._store, self._workflow = store, workflow
        self._jobs, self._schedule, self._attempts = jobs, schedule, attempts
        self._ledger, self._reuse = ledger, reuse
        self._active: dict[int, Study] = {}
        self._adding = 0
        self._events: dict[int, dict[str, dict[str, Any]]] = {}
        if any(row.kind == KIND for row in jobs.rows.values()):
            for event in store.events(workflow):
                if event.kind == TRIAL and event.job_id is not None:
                    of_study = self._events.setdefault(event.job_id, {})
                    of_study[str(event.data["number"])] = event.data

    def of_trials(self) -> set[int]:
        """The jobs that belong to a trial."""
        return {row.id for row in self._jobs.rows.values() if "/" in row.job}

    def settled(self) -> set[int]:
        """The jobs of trials that are over: nothing more becomes of them."""
        over = {
            f"{self._jobs[study].name}/{number}/"
            for study, trials in self._events.items()
            for number, data in trials.items()
            if data["state"] != "running"
        }
        return {
            row.id for row in self._jobs.rows.values() if row.job.rpartition("/")[0] + "/" in over
        }

    def interrupted(self, now: float) -> None:
        """End the attempts of studies that ran when a controller died; they begin again."""
        for row in self._jobs.rows.values():
            if row.kind == KIND and self._schedule.state(row.id) is JobState.RUNNING:
                self._end(row.id, row.attempt, Cause.STOPPED, now, "its controller died")

    def tick(self, now: float) -> None:
        """Begin what can begin, and take every study a step on."""
        for job in self._schedule.inline():
            self._begin(job, now)
        if self._adding:
            return
        for study in list(self._active.values()):
            try:
                self._advance(study, now)
            except KvlabError as error:
                self._over(study, Cause.USER_ERROR, now, str(error))

    def due(self, now: float) -> float | None:
        """When the next `tick` may have something to do that no message announces."""
        return now + LOOK_SECONDS if self._active else None

    def end_all(self, cause: Cause, now: float) -> None:
        """End all studies; with STOPPED they go on another time."""
        for study in list(self._active.values()):
            self._over(study, cause, now, None)

    def close(self) -> None:
        """Leave every sampler."""
        for study in self._active.values():
            study.broker.close()
        self._active.clear()

    def views(self) -> tuple[StudyView, ...]:
        """How each study stands, for a person."""
        return tuple(self._view(study) for study in list(self._active.values()))

    def _begin(self, job: int, now: float) -> None:
        attempt = self._schedule.started(job, now)
        self._ledger.row(lambda batch: batch.start(job, WORKER), job, "start")
        self._jobs.note(job, attempt, JobState.RUNNING, started_at=now, ended_at=None)
        row = self._jobs[job]
        events = self._events.setdefault(job, {})
        broker, trials = self._made(row, events)
        study = Study(row, attempt, broker, trials)
        if not trials.has_baseline:
            study.base = {}
        for number, data in events.items():
            if data["state"] == "running":
                prefix = f"{row.name}/{number}/"
                study.jobs[number] = [
                    other.id for other in self._jobs.rows.values() if other.job.startswith(prefix)
                ]
            elif number == _baseline():
                study.base = {name: Measured(**one) for name, one in data["measured"].items()}
            else:
                study.told[int(number)] = data
        self._active[job] = study

    def _made(self, row: JobRow, events: Mapping[str, Mapping[str, Any]]) -> tuple[Broker, Trials]:
        """A study's broker, with what it knew, and what makes its trials' jobs."""
        from kvlab.platform.jobs.search.settings import space_of
        from kvlab.platform.search.broker import Broker
        from kvlab.platform.search.rows import Row
        from kvlab.platform.search.space import Space
        from kvlab.platform.search.trials import Trials

        spec = row.spec
        names = {name for arm in spec["arms"] for name in arm["parents"].values()}
        names |= set(row.parents.values())
        outside = {name: self._parent(name) for name in names}
        identities = {name: self._jobs.named(name).identity for name in names}
        trials = Trials(row.name, spec, outside, identities)
        broker = Broker(
            Space(space_of(spec), trials.problem),
            spec["objectives"],
            spec["trials"],
            sampler=spec["sampler"],
            seed=spec["seed"],
            ahead=spec["parallel"],
            constraints=[limit_text(limit) for limit in spec["constraints"]],
        )
        rows = [
            Row(**{name: data[name] for name in Row.__dataclass_fields__})
            for number, data in events.items()
            if number != _baseline()
        ]
        if rows:
            broker.restore(rows)
        broker.start()
        return broker, trials

    def _parent(self, name: str) -> Parent:
        row = self._jobs.named(name)
        return Parent(
            name,
            row.kind,
            row.spec,
            {role: self._parent(parent) for role, parent in row.parents.items()},
        )

    def _advance(self, study: Study, now: float) -> None:
        for number, jobs in list(study.jobs.items()):
            if all(self._schedule.state(job) in TERMINAL for job in jobs):
                self._settle(study, number, now)
        if self._active.get(study.row.id) is not study:
            return
        if study.base is None and _baseline() not in study.jobs:
            self._try(study, _baseline(), study.trials.baseline(), {"state": "running"})
            return
        while len(study.jobs) < study.spec["parallel"] and study.broker.ready:
            point = study.broker.ask()
            if point is None:
                break
            number = str(point.number)
            if number in study.jobs:  # its jobs go on by themselves
                continue
            row = next(row for row in study.broker.rows() if row.number == point.number)
            cells = study.trials.cells(point.number, point.values)
            self._try(study, number, cells, asdict(row))
        self._tell_repeats(study)
        if not study.jobs and study.broker.over:
            self._finish(study, now)

    def _try(
        self, study: Study, number: str, cells: Sequence[Cell], data: Mapping[str, Any]
    ) -> None:
        """Store the jobs of a trial; they run once they are stored."""
        job, attempt = study.row.id, study.attempt
        ids: list[int] = []
        study.jobs[number] = ids
        self._adding += 1

        def write(batch: Batch) -> None:
            batch.event(TRIAL, job, attempt, {**data, "number": _number(number)})
            ids[:] = batch.add([new_job(cell) for cell in cells])

        self._ledger.row(write)
        self._ledger.then(lambda: self._added(ids, cells))

    def _added(self, ids: Sequence[int], cells: Sequence[Cell]) -> None:
        self._adding -= 1
        rows = [fresh(job, new_job(cell)) for job, cell in zip(ids, cells, strict=True)]
        self._jobs.add(rows)
        states = {row.id: row.state for row in rows}
        self._attempts.moved(self._schedule.add([self._jobs.task(row) for row in rows], states))
        finished = self._store.finished({row.identity for row in rows})
        for row in rows:
            found = finished.get(row.identity)
            if found is not None and usable(found):
                self._reuse(row.id, found, time.time())

    def _settle(self, study: Study, number: str, now: float) -> None:
        """All jobs of a trial are over: tell the sampler what came of it."""
        jobs = study.jobs[number]
        failed = [job for job in jobs if self._schedule.state(job) is not JobState.DONE]
        found = measured([self._done(job) for job in jobs if job not in failed], study.metrics)
        lacking = [name for name in study.metrics if name not in found]
        if number == _baseline():
            if failed or lacking:
                why = self._why(failed) if failed else f"it reports no {lacking[0]}"
                self._over(study, Cause.USER_ERROR, now, f"the baseline was not measured: {why}")
                return
            del study.jobs[number]
            study.base = found
            self._note(study, {"number": number, "state": "complete", "measured": _plain(found)})
            return
        if study.base is None:
            return  # constraints are set against it
        del study.jobs[number]
        ended = int(number)
        values = {name: one.value for name, one in found.items()}
        if failed or lacking:
            study.broker.tell(ended, state="failed")
            said = self._why(failed) if failed else f"its jobs report no {lacking[0]}"
        else:
            limits = {
                limit_text(limit): excess(limit, values, self._base(study, limit))
                for limit in study.spec["constraints"]
            }
            objectives = {name: values[name] for name in study.spec["objectives"]}
            study.broker.tell(ended, objectives, limits)
            said = None
        self._store_row(study, ended, {"measured": _plain(found), "message": said})
        self._warn(study)

    def _store_row(self, study: Study, number: int, beside: Mapping[str, Any]) -> None:
        row = next(row for row in study.broker.rows() if row.number == number)
        data = {**asdict(row), **beside}
        study.told[number] = data
        self._note(study, data)

    def _tell_repeats(self, study: Study) -> None:
        for row in study.broker.repeats():
            first = study.told.get(row.same_as) if row.same_as is not None else None
            self._store_row(study, row.number, {"measured": (first or {}).get("measured", {})})

    def _note(self, study: Study, data: Mapping[str, Any]) -> None:
        job, attempt = study.row.id, study.attempt
        self._events[job][str(data["number"])] = dict(data)
        self._ledger.row(lambda batch: batch.event(TRIAL, job, attempt, data))

    def _base(self, study: Study, limit: Mapping[str, Any]) -> float | None:
        assert study.base is not None
        return study.base[limit["metric"]].value if limit["of_baseline"] else None

    def _done(self, job: int) -> Done:
        row = self._jobs[job]
        return Done(row.kind, row.axes.get("seed"), row.spec, self._jobs.result(job) or {})

    def _why(self, failed: Iterable[int]) -> str:
        """What the first of failed jobs said."""
        for job in failed:
            message = self._jobs.facts.get(job, {}).get("message") or self._jobs[job].message
            if message:
                return f"{self._jobs[job].name}: {str(message).strip().splitlines()[0]}"
        return "its jobs did not finish"

    def _warn(self, study: Study) -> None:
        """Say once that no trial meets the constraints."""
        complete = [data for data in study.told.values() if data["state"] == "complete"]
        if len(complete) == HOPELESS and study.spec["constraints"] and not study.broker.front():
            limits = ", ".join(limit_text(limit) for limit in study.spec["constraints"])
            said = f"none of {HOPELESS} trials meets {limits}"
            self._jobs.tell(study.row.id, study.attempt, JobState.RUNNING, message=said)

    def _finish(self, study: Study, now: float) -> None:
        result = self._result(study)
        if not any(data["state"] == "complete" for data in study.told.values()):
            first = next((d["message"] for d in study.told.values() if d.get("message")), "")
            self._over(study, Cause.USER_ERROR, now, f"no trial was completed: {first}")
            return
        self._over(study, Cause.DONE, now, None, result)

    def _result(self, study: Study) -> dict[str, Any]:
        """What a study found; see docs/search.md."""
        broker = study.broker
        rows = [study.told[number] for number in sorted(study.told)]
        one = len(study.spec["objectives"]) == 1
        best = broker.best() if one else None
        return {
            "trials": rows,
            "baseline": _plain(study.base or {}),
            "best": None if best is None else best.number,
            "front": [row.number for row in broker.front()],
            "importances": broker.importances(),
            "ended": broker.ended or None,
        }

    def _over(
        self,
        study: Study,
        cause: Cause,
        now: float,
        message: str | None,
        result: dict[str, Any] | None = None,
    ) -> None:
        del self._active[study.row.id]
        study.broker.close()
        self._end(study.row.id, study.attempt, cause, now, message, result)

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
        if result is not None:
            self._jobs.artifacts[job] = None
        self._attempts.moved(verdict.moves)

    def _view(self, study: Study) -> StudyView:
        rows = study.broker.rows()
        return StudyView(
            study.row.name,
            Counter(row.state for row in rows if row.source != "repeat"),
            study.spec["trials"],
            tuple(_shown(row) for row in self._leading(study)),
        )

    def _leading(self, study: Study) -> list[Row]:
        if len(study.spec["objectives"]) > 1:
            return study.broker.front()
        best = study.broker.best()
        return [] if best is None else [best]


def _shown(row: Row) -> str:
    from kvlab.platform.search.trials import text_of

    numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.objectives.items())
    return f"{numbers} at {text_of(row.values)} (trial {row.number})"


def _plain(found: Mapping[str, Measured]) -> dict[str, Any]:
    return {name: one.to_dict() for name, one in found.items()}


def _baseline() -> str:
    from kvlab.platform.search.trials import BASELINE

    return BASELINE


def _number(number: str) -> int | str:
    return int(number) if number.isdigit() else number
