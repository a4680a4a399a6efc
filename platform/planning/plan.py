"""The plan of a workflow: what is there already, what is stale and why, what will run and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvlab.db.errors import NoStore
from kvlab.db.store import Store
from kvlab.platform.graph import Cell, Graph
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.kind import Parent, Prediction
from kvlab.platform.planning.history import NEWEST, Duration, History
from kvlab.platform.planning.studies import StudyCost, cost_of
from kvlab.platform.spec.deferred import DEFERRED
from kvlab.platform.spec.identity import changed, explain

State = Literal["reusable", "stale", "to run"]
REASONS = 3
"""Changed parts that are named; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One cell: its state, why it is stale, and what it will cost; `study`: its trials' jobs."""

    cell: Cell
    state: State
    why: str
    prediction: Prediction
    duration: Duration | None
    study: StudyCost | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A graph's cells as planned, parents first."""

    graph: Graph
    cells: tuple[Planned, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What a store says about a graph: identities with a result, and the jobs before them."""

    finished: frozenset[str] = frozenset()
    previous: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    history: History = field(default_factory=History)


def look_up(graph: Graph, url: str) -> Known:
    """Read the store at `url`; a store that is not there yet knows nothing, and is not made."""
    try:
        store = Store.open(url, read_only=True)
    except NoStore:
        return Known()
    with store:
        return Known(
            frozenset(store.have(cell.identity for cell in graph.cells)),
            store.previous(graph.name),
            History.of(store.done(NEWEST)),
        )


def make(graph: Graph, known: Known) -> Plan:
    """Plan every cell of a graph."""
    parents: dict[str, Parent] = {}
    durations: dict[tuple[str, Prediction, object], Duration | None] = {}
    planned = []
    for cell in graph.cells:
        above = {role: parents[name] for role, name in cell.parents.items()}
        parents[cell.name] = Parent(cell.name, cell.kind, cell.spec, above)
        prediction = KINDS[cell.kind].predict(cell.spec, above)
        key = (cell.kind, prediction, cell.resources)
        study = cost_of(cell, parents) if cell.kind == "search" else None
        if key not in durations:
            durations[key] = (  # what another study took says nothing of this one's trials
                None if study else known.history.predict(cell.kind, prediction, cell.resources)
            )
        state, why = _state(cell, known)
        planned.append(Planned(cell, state, why, prediction, durations[key], study))
    return Plan(graph, tuple(planned))


def _state(cell: Cell, known: Known) -> tuple[State, str]:
    if DEFERRED in cell.spec:
        return "to run", "what exactly, a search decides: it may be reusable then"
    if cell.identity in known.finished:
        return "reusable", ""
    before = known.previous.get(cell.name)
    if before is None:
        return "to run", ""
    names = changed(before, cell.parts)
    if not names:
        return "stale", "its measurement was void"
    shown = [explain(name, before, cell.parts) for name in names[:REASONS]]
    more = f" and {len(names) - REASONS} more" if len(names) > REASONS else ""
    return "stale", ", ".join(shown) + more
