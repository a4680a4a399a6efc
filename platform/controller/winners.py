"""What a search found, passed on to the jobs that build on its winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.db.batches import Batch
from kvlab.db.rows import JobRow
from kvlab.platform.controller.jobs import Jobs
from kvlab.platform.controller.ledger import Ledger
from kvlab.platform.graph import Resources
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.search.described import space_of
from kvlab.platform.search.outcome import limit_text
from kvlab.platform.search.space import Space, Values
from kvlab.platform.search.trials import FROM
from kvlab.platform.spec.deferred import DEFERRED, settled

if TYPE_CHECKING:
    from kvlab.platform.search.trials import Trials


def winner(
    result: Mapping[str, Any], arm: Mapping[str, Any], trials: Trials
) -> tuple[Parent, dict[str, Any]]:
    """The model of a search's best trial for one seed, and the point that was tried."""
    values = next(
        trial["values"] for trial in result["trials"] if trial["number"] == result["best"]
    )
    return trials.model(str(result["best"]), values, arm), values


def first_points(row: JobRow, jobs: Jobs) -> list[Values]:
    """The best points of the study that this one goes on from, if there is one."""
    from kvlab.platform.search.promotion import promoted

    if FROM not in row.parents:
        return []
    earlier = jobs.named(row.parents[FROM])
    trials = jobs.done(earlier.id).result["trials"]
    space = Space(space_of(row.spec))
    return promoted(trials, earlier.spec["objectives"], space, row.spec["promote"])


def pass_on(
    search: JobRow, trials: Trials, result: Mapping[str, Any], jobs: Jobs, ledger: Ledger
) -> list[int]:
    """Resolve the jobs that wait for a search's winner, as far as nothing else lacks.

    Raises:
        KvlabError: one cannot be built on this winner.
    """
    resolved: list[int] = []
    waiting = [row for row in jobs.rows.values() if DEFERRED in row.spec]
    if not waiting:
        return resolved
    if result["best"] is None:
        limits = ", ".join(limit_text(limit) for limit in search.spec["constraints"])
        raise KvlabError(f"no trial meets {limits}: there is no winner to go on from")
    models = {arm["seed"]: winner(result, arm, trials)[0] for arm in search.spec["arms"]}
    values = winner(result, search.spec["arms"][0], trials)[1]
    found = trials.methods(values)
    for row in waiting:
        held = row.spec[DEFERRED]
        best = models.get(held["seed"]) or next(iter(models.values()))
        names = {
            role: best.name if name == search.name else name for role, name in row.parents.items()
        }
        above = [*names.values(), *(n for all_ in held["siblings"].values() for n in all_)]
        if any(_unknown(jobs, name, search.name) for name in above):
            continue

        def parent(name: str, best: Parent = best) -> Parent:
            return jobs.as_parent(best.name if name == search.name else name)

        parents = {role: parent(name) for role, name in names.items()}
        siblings = {
            role: tuple(parent(name) for name in all_) for role, all_ in held["siblings"].items()
        }
        direct = search.name in row.parents.values()
        spec, identity, parts = settled(
            row.kind,
            held,
            parents,
            siblings,
            {name: jobs.named(name).identity for name in names.values()},
            Resources(**row.resources),
            tuple(search.spec["machine"]),
            found if direct else {},
        )
        resolved.append(row.id)
        jobs.add([replace(row, spec=spec, parents=names, identity=identity, parts=parts)])
        ledger.row(
            partial(
                Batch.resolve,
                job_id=row.id, spec=spec, parents=names, identity=identity, parts=parts,
            )
        )  # fmt: skip
    return resolved


def _unknown(jobs: Jobs, name: str, search: str) -> bool:
    """Whether a job waits for another search yet, or is one that has not ended."""
    if name == search:
        return False
    row = jobs.named(name)
    return DEFERRED in row.spec or row.kind == "search"
