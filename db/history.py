"""What finished jobs tell the next plan: what they were, and how long they took."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select

from kvlab.db.states import JobState
from kvlab.db.tables import JOBS, WORKFLOWS

_J, _W = JOBS.c, WORKFLOWS.c
AT_ONCE = 5_000
"""Identities per statement: below both databases' limits on parameters."""


class Done(NamedTuple):
    """A finished job as a planner needs it. `seconds` is None where the result was reused."""

    workflow_id: int
    name: str
    kind: str
    spec: dict[str, Any]
    parents: dict[str, str]
    resources: dict[str, Any]
    seconds: float | None


def done(connection: Connection, limit: int) -> list[Done]:
    """The newest finished jobs, at most `limit`."""
    newest = (
        select(
            _J.workflow_id, _J.name, _J.kind, _J.spec, _J.parents, _J.resources,
            _J.started_at, _J.ended_at, _J.reused_from,
        )
        .where(_J.state == JobState.DONE.value)
        .order_by(_J.id.desc())
        .limit(limit)
    )  # fmt: skip
    found = []
    for number, name, kind, spec, parents, resources, start, end, reused in connection.execute(
        newest
    ):
        ran = reused is None and start is not None and end is not None
        took = end - start if ran else None
        loaded = json.loads(spec), json.loads(parents), json.loads(resources)
        found.append(Done(number, name, kind, *loaded, took))
    return found


def have(connection: Connection, identities: Iterable[str]) -> set[str]:
    """Those identities that `queries.finished` finds; results stay unread."""
    wanted = list(dict.fromkeys(identities))
    own = select(_J.identity).where(_J.state == JobState.DONE.value, _J.reusable)
    found: set[str] = set()
    for first in range(0, len(wanted), AT_ONCE):
        some = own.where(_J.identity.in_(wanted[first : first + AT_ONCE]))
        found.update(connection.execute(some).scalars())
    return found


def previous(connection: Connection, workflow: str) -> dict[str, dict[str, str]]:
    """Cell name -> identity parts of its newest finished job in workflows of this name."""
    newest = (
        select(func.max(_J.id))
        .join(WORKFLOWS, _W.id == _J.workflow_id)
        .where(_W.name == workflow, _J.state == JobState.DONE.value)
        .group_by(_J.name)
    )
    rows = connection.execute(select(_J.name, _J.parts).where(_J.id.in_(newest)))
    return {name: json.loads(parts) for name, parts in rows}
