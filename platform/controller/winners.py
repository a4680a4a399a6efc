"""What a search found, passed on to the jobs that build on its winner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.batches import Batch
from kvlab.db.rows import JobRow
from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.controller.schedule import Schedule
from kvlab.platform.graph import Cell, Resources
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.search.described import space_of
from kvlab.platform.search.outcome import limit_text
from kvlab.platform.search.space import Space, Values
from kvlab.platform.search.trials import FROM
from kvlab.platform.spec.deferred import DEFERRED, settled

if TYPE_CHECKING:
    from kvlab.platform.search.trials import Trials


class Winners:
    """Resolves deferred jobs, once every search that they wait for is done."""

    def __init__(self, jobs: Jobs, schedule: Schedule, ledger: Ledger) -> None:
        self._jobs, self._schedule, self._ledger = jobs, schedule, ledger
        self._known: dict[int, tuple[Mapping[str, Any], Trials]] = {}
        """Search -> its result and what makes its trials."""

    def resolve(self, job: int) -> Iterator[int]:
        """Say what a ready job is, and what those are that it stands beside; yield each.

        Raises:
            KvlabError: it cannot be built on the winner.
        """
        row = self._jobs[job]
        held = row.spec[DEFERRED]
        beside = [name for all_ in held["siblings"].values() for name in all_]
        above = dict.fromkeys((*row.parents.values(), *beside))
        for name in above:
            other = self._jobs.named(name)
            if DEFERRED in other.spec:
                try:
                    yield from self.resolve(other.id)
                except KvlabError as error:
                    raise KvlabError(f"{name}: {error}") from error
        searches = {name for name in above if self._jobs.named(name).kind == "search"}
        best = {name: self._best(name, held["seed"]).name for name in searches}
        names = {role: best.get(name, name) for role, name in row.parents.items()}

        def parent(name: str) -> Parent:
            return self._jobs.as_parent(best.get(name, name))

        try:
            spec, identity, parts = settled(
                row.kind,
                held,
                {role: parent(name) for role, name in names.items()},
                {role: tuple(map(parent, all_)) for role, all_ in held["siblings"].items()},
                {name: self._jobs.named(name).identity for name in names.values()},
                Resources(**row.resources),
                self._machine(row),
                self._methods(row),
            )
        except KvlabError as error:
            if not best:
                raise
            winners = ", ".join(f"{name}.best ({best[name]})" for name in sorted(best))
            raise KvlabError(f"it cannot build on {winners}: {error}") from error
        new = replace(row, spec=spec, parents=names, identity=identity, parts=parts)
        self._jobs.add([new])
        self._ledger.row(
            partial(
                Batch.resolve,
                job_id=job, spec=spec, parents=names, identity=identity, parts=parts,
            )
        )  # fmt: skip
        self._schedule.resolved(self._jobs.task(new))
        yield job

    def lacking(self, search: JobRow, result: Mapping[str, Any]) -> Sequence[Cell]:
        """The jobs of another workflow's winner that are to join this one.

        Raises:
            KvlabError: there is no winner's model.
        """
        trials = trials_of(search, self._jobs)
        values = _point(result)
        model = trials.model(str(result["best"]), values, search.spec["arms"][0])
        return [] if model.name in self._jobs else trials.cells(result["best"], values)

    def _best(self, name: str, seed: int | None) -> Parent:
        """The model of a search's best trial for a seed, or for its first one."""
        row = self._jobs.named(name)
        result, trials = self._found(row)
        arms = row.spec["arms"]
        arm = next((arm for arm in arms if arm["seed"] == seed), arms[0])
        return trials.model(str(result["best"]), _point(result), arm)

    def _methods(self, row: JobRow) -> dict[str, Any]:
        """What a job that builds on a winner itself takes from it, where it says nothing."""
        found: dict[str, Any] = {}
        for name in row.parents.values():
            search = self._jobs.named(name)
            if search.kind == "search":
                result, trials = self._found(search)
                found = trials.methods(_point(result)) | found
        return found

    def _machine(self, row: JobRow) -> tuple[str | None, int | None]:
        rows = (self._jobs.named(name) for name in row.needs)
        name, cpus = next(one.spec["machine"] for one in rows if one.kind == "search")
        return name, cpus

    def _found(self, search: JobRow) -> tuple[Mapping[str, Any], Trials]:
        if search.id not in self._known:
            result = self._jobs.done(search.id).result
            self._known[search.id] = result, trials_of(search, self._jobs)
        result, trials = self._known[search.id]
        if result["best"] is None:
            limits = ", ".join(limit_text(limit) for limit in search.spec["constraints"])
            raise KvlabError(
                f"no trial of {search.name} meets {limits}: there is no winner to go on from"
            )
        return result, trials


def first_points(row: JobRow, jobs: Jobs) -> list[Values]:
    """The best points of the study that this one goes on from, if there is one."""
    from kvlab.platform.search.promotion import promoted

    if FROM not in row.parents:
        return []
    earlier = jobs.named(row.parents[FROM])
    trials = jobs.done(earlier.id).result["trials"]
    space = Space(space_of(row.spec))
    return promoted(trials, earlier.spec["objectives"], space, row.spec["promote"])


def trials_of(search: JobRow, jobs: Jobs) -> Trials:
    """What makes the jobs of a search's trials."""
    from kvlab.platform.search.trials import Trials

    names = {name for arm in search.spec["arms"] for name in arm["parents"].values()}
    names |= set(search.parents.values())
    outside = {name: jobs.as_parent(name) for name in names}
    identities = {name: jobs.named(name).identity for name in names}
    return Trials(search.name, search.spec, outside, identities)


def _point(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of the best trial."""
    values: Mapping[str, Any] = next(
        trial["values"] for trial in result["trials"] if trial["number"] == result["best"]
    )
    return values
