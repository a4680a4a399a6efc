"""Which jobs a job names, and an order in which parents come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.field import Path, suggest
from kvlab.platform.spec.combine import Variant, reference_places
from kvlab.platform.spec.workflow import JobEntry, Workflow

MOST_LISTED = 8
"""Jobs that a message lists."""

Variants = Mapping[str, Sequence[Variant]]


class Named(NamedTuple):
    """A job that another one names, where it does, and as what (None: in `needs`)."""

    name: str
    place: Path
    role: str | None
    best: bool = False


def named(job: JobEntry, variants: Variants) -> Iterator[Named]:
    """Yield every job that a job names, over all its variants."""
    for variant in variants.get(job.name, ()):
        for role in variant.references:
            for reference, place in reference_places(job, variant, role):
                yield Named(reference.job, place, role, reference.best)
    for index, name in enumerate(job.common.needs):
        yield Named(name, (*job.path, "needs", index), None)


def order(workflow: Workflow, variants: Variants) -> list[str]:
    """Return the names of the sound jobs, parents first; none of them after a cycle.

    References to jobs that are not there, or that have not what is wanted, go to the workflow as
    mistakes.
    """
    written = workflow.document.value["jobs"]
    sorter: TopologicalSorter[str] = TopologicalSorter()
    places: dict[tuple[str, str], Path] = {}
    for job in workflow.jobs.values():
        sorter.add(job.name)
        for name, place, role, best in named(job, variants):
            if name not in written:
                workflow.blame(place, f"unknown job '{name}': {suggest(name, list(written))}")
                continue
            target = workflow.jobs.get(name)
            if target is None:
                continue
            if role is not None and (problem := _misnamed(workflow, target, job, role, best)):
                workflow.blame(place, problem)
            sorter.add(job.name, name)
            places.setdefault((job.name, name), place)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        circle = _from_first(list(reversed(error.args[1]))[:-1], list(workflow.jobs))
        said = " needs ".join([*circle, circle[0]])
        workflow.blame(places[circle[0], (*circle, circle[0])[1]], f"a cycle: {said}")
        return []


def _from_first(circle: Sequence[str], written: Sequence[str]) -> list[str]:
    """Turn a circle so that it begins with the job that is written first."""
    start = circle.index(min(circle, key=written.index))
    return [*circle[start:], *circle[:start]]


def _misnamed(
    workflow: Workflow, target: JobEntry, job: JobEntry, role: str, best: bool
) -> str | None:
    """What is wrong with a job in this role, if anything."""
    wanted = KINDS[job.kind].reference_kinds.get(role)
    searches = KINDS[target.kind].inline
    if best and not searches:
        return f"'{target.name}' is of kind {target.kind}: only a search has a best"
    if best and wanted == target.kind:
        return f"is about all that the search found: name it without .best, {target.name}"
    if searches and wanted is None:
        winner = f"{target.name}.best"
        return None if best else f"'{target.name}' is a search: name its winner, {winner}"
    if wanted is None and KINDS[target.kind].produces_model:
        return None
    if wanted == target.kind:
        return None
    able = [
        other.name
        for other in workflow.jobs.values()
        if (KINDS[other.kind].produces_model if wanted is None else other.kind == wanted)
    ]
    listed = ", ".join(able[:MOST_LISTED]) + (", ..." if len(able) > MOST_LISTED else "")
    if wanted is None:
        lacks = "publishes no model; jobs that do"
    else:
        lacks = f"has no {role}; jobs of kind {wanted}, which do"
    return f"'{target.name}' is of kind {target.kind} and {lacks}: {listed or 'none'}"
