"""The jobs of a workflow as a controller keeps them: rows of SQL, with their parents found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvlab.db.batches import is_reusable
from kvlab.db.rows import FinishedJob, JobRow, NewJob
from kvlab.db.states import Cause, JobState
from kvlab.platform.controller.schedule import Task
from kvlab.platform.controller.slots import Slot
from kvlab.platform.controller.snapshot import Change
from kvlab.platform.graph import Cell, Resources
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.search.outcome import Done
from kvlab.platform.spec.deferred import DEFERRED
from kvlab.platform.worker.message import Assignment


class Jobs:
    """Rows as they were loaded, by id, and what became of them since.

    Attributes:
        artifacts: published folder of each done job.
        checkpoints: (step, folder) of each job's newest visible one.
        facts: job -> columns that changed since the load. changed: jobs with new facts.
        history: what a person following the workflow is told, in order.
    """

    def __init__(self, rows: Iterable[JobRow]) -> None:
        self.rows = {row.id: row for row in rows}
        self.facts: dict[int, dict[str, Any]] = {}
        self.changed: set[int] = set()
        self.history: list[Change] = []
        self.checkpoints: dict[int, tuple[int, str]] = {
            row.id: (row.checkpoint.step, row.checkpoint.uri)
            for row in self.rows.values()
            if row.checkpoint is not None
        }
        self._ids = {row.name: row.id for row in self.rows.values()}
        self.artifacts = {
            row.id: row.artifact_uri for row in self.rows.values() if row.state is JobState.DONE
        }

    def __getitem__(self, job: int) -> JobRow:
        return self.rows[job]

    def tasks(self) -> list[Task]:
        return [self.task(row) for row in self.rows.values()]

    def task(self, row: JobRow) -> Task:
        return Task(
            row.id,
            tuple({self._ids[name]: None for name in (*row.parents.values(), *row.needs)}),
            Resources(**row.resources),
            {Cause(cause): count for cause, count in row.retries.items()},
            row.timeout,
            DEFERRED in row.spec or (row.kind in KINDS and KINDS[row.kind].inline),
            "" if DEFERRED in row.spec else row.identity,
        )

    def add(self, rows: Iterable[JobRow]) -> None:
        """Take in jobs that came later, or what a job is now that it is known."""
        for row in rows:
            self.rows[row.id] = row
            self._ids[row.name] = row.id

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def as_parent(self, name: str) -> Parent:
        """A job as those that build on it see it when they are resolved."""
        row = self.named(name)
        above = {role: self.as_parent(parent) for role, parent in row.parents.items()}
        return Parent(name, row.kind, row.spec, above)

    def named(self, name: str) -> JobRow:
        """The job of that name."""
        return self.rows[self._ids[name]]

    def done(self, job: int) -> Done:
        """A done job, as whoever reads its numbers wants it."""
        row = self.rows[job]
        result = self.facts.get(job, {}).get("result") or row.result or {}
        return Done(row.kind, row.axes.get("seed"), row.spec, result)

    def finished(self, job: int, workflow: int) -> FinishedJob | None:
        """A done job of the workflow, as another one is done with it; None: it cannot be."""
        row, facts = self.rows[job], self.facts.get(job, {})
        result = facts.get("result") or row.result or {}
        if not is_reusable(result):
            return None
        origin = facts.get("reused_from") or row.reused_from or job
        ended = facts.get("ended_at") or row.ended_at or 0.0
        return FinishedJob(origin, workflow, result, self.artifacts.get(job), ended)

    def inputs(self, job: int) -> dict[str, str]:
        """role -> published folder of that parent; parents that published nothing are left out."""
        found = {
            role: self.artifacts.get(self._ids[name])
            for role, name in self.rows[job].parents.items()
        }
        return {role: folder for role, folder in found.items() if folder is not None}

    def assignments(
        self,
        workflow: int,
        job: int,
        attempt: int,
        restore: tuple[int, str] | None,
        slot: Slot,
        rendezvous: str | None,
    ) -> list[Assignment]:
        """What each rank of an attempt on `slot` is told."""
        row, inputs = self.rows[job], self.inputs(job)
        return [
            Assignment(
                workflow=workflow,
                job=job,
                attempt=attempt,
                cell=row.name,
                kind=row.kind,
                spec=row.spec,
                identity=row.identity,
                inputs=inputs,
                restore=restore,
                threads=slot.threads,
                gpus=slot.shape.gpus,
                rank=rank,
                workers=slot.shape.workers,
                rendezvous=rendezvous,
            )
            for rank in range(slot.shape.workers)
        ]

    def note(
        self,
        job: int,
        attempt: int,
        state: JobState,
        *,
        told: bool = True,
        began: float | None = None,
        **columns: Any,
    ) -> None:
        """The job's row changed: to `state`, and in these columns.

        Args:
            told: whether a person following the workflow hears of it.
            began: when the job itself began, where an attempt ended.
        """
        self.facts.setdefault(job, {}).update(columns, state=state)
        self.changed.add(job)
        if told and (state not in (JobState.WAITING, JobState.QUEUED) or columns.get("cause")):
            self.tell(job, attempt, state, began, **columns)

    def tell(
        self,
        job: int,
        attempt: int,
        state: JobState,
        began: float | None = None,
        note: str | None = None,
        **columns: Any,
    ) -> None:
        """Add to the history; see `note`, and `Change` for the argument of that name."""
        self.history.append(
            Change(
                self.rows[job].name,
                state,
                attempt,
                columns.get("cause"),
                columns.get("message"),
                None if began is None else columns["ended_at"] - began,
                "reused_from" in columns,
                note,
            )
        )

    def note_checkpoint(self, job: int, checkpoint: tuple[int, str]) -> None:
        """A checkpoint of the job became visible."""
        self.checkpoints[job] = checkpoint
        self.changed.add(job)

    def checkpoint(self, job: int) -> tuple[int, str] | None:
        """The checkpoint to continue from: the newest that is stored, if it is still there."""
        found = self.checkpoints.get(job)
        if found is None or not Path(found[1]).is_dir():
            return None
        return found

    def model(self, job: int) -> Mapping[str, object] | None:
        """The spec of the job whose model this one measures."""
        parent = self.rows[job].parents.get("of")
        return None if parent is None else self.rows[self._ids[parent]].spec


def usable(finished: FinishedJob | None) -> bool:
    """Whether a finished job can stand in for another: its files must still be there."""
    if finished is None:
        return False
    return finished.artifact_uri is None or Path(finished.artifact_uri).is_dir()


def new_job(cell: Cell) -> NewJob:
    """The row of a cell."""
    resources = cell.resources
    return NewJob(
        name=cell.name,
        job=cell.job,
        kind=cell.kind,
        spec=cell.spec,
        axes=cell.axes,
        parents=cell.parents,
        needs=cell.needs,
        identity=cell.identity,
        parts=cell.parts,
        resources={name: getattr(resources, name) for name in Resources.__slots__},
        retries={str(cause): count for cause, count in cell.retries.items()},
        timeout=cell.timeout,
    )
