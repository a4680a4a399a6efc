"""How long a try will take, before anything ran."""

from __future__ import annotations

from kvlab.platform.graph import Graph
from kvlab.platform.home import Home
from kvlab.platform.planning import plan
from kvlab.platform.planning.plan import Planned
from kvlab.platform.spec import machine

START_SECONDS = 6.0
"""Ray, and torch in the first worker."""
JOB_SECONDS = 0.6
"""The least that a job takes: to load the model, and to store what it found."""


def seconds(graph: Graph, home: Home, cpus: int | None) -> float:
    """Return the seconds that a graph's jobs take here, those that are finished left out."""
    made = plan.make(graph, plan.look_up(graph, home.url))
    waiting = [planned for planned in made.cells if planned.state != "reusable"]
    if not waiting:
        return 0.0
    room = cpus or machine.cpus()
    alone = sum(_one(planned) for planned in waiting if planned.cell.resources.exclusive)
    shared = sum(
        _one(planned) * planned.cell.resources.cpus
        for planned in waiting
        if not planned.cell.resources.exclusive
    )
    return START_SECONDS + alone + shared / room


def _one(planned: Planned) -> float:
    found = planned.duration
    if found is None:
        return JOB_SECONDS
    return found.seconds if found.basis == "like jobs" else max(JOB_SECONDS, found.seconds)
