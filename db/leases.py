"""One controller per workflow: claim, renew, release, and the guard that every batch begins with.

A lease is columns of the workflow's row. Time decides only when another controller MAY take over;
the token decides who is heard: it grows with every claim, and a batch under an older one is refused
whatever any clock says.
"""

from __future__ import annotations

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Text,
    case,
    cast,
    func,
    null,
    or_,
    select,
    text,
    update,
)

from kvlab.db.errors import Held, IllegalMove, LeaseLost, NotFound, StoreError
from kvlab.db.rows import Lease
from kvlab.db.states import WorkflowState
from kvlab.db.tables import WORKFLOWS

_W = WORKFLOWS.c
_ENDS = frozenset(WorkflowState) - {WorkflowState.RUNNING}


def claim(connection: Connection, workflow_id: int, owner: str, ttl: float, now: float) -> Lease:
    """Take the lease if it is free or has ended; the workflow runs again unless it is done.

    Raises:
        Held: another lease is live. NotFound: no such workflow.
    """
    token = connection.execute(
        update(WORKFLOWS)
        .where(_W.id == workflow_id, or_(_W.owner.is_(None), _W.expires_at <= now))
        .values(
            owner=owner,
            expires_at=now + ttl,
            token=_W.token + 1,
            request=None,
            state=case(
                (_W.state == WorkflowState.DONE, _W.state), else_=WorkflowState.RUNNING.value
            ),
            ended_at=case((_W.state == WorkflowState.DONE, _W.ended_at)),
        )
        .returning(_W.token)
    ).scalar()
    if token is not None:
        return Lease(workflow_id, token, owner)
    row = connection.execute(
        select(_W.owner, _W.expires_at).where(_W.id == workflow_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no workflow {workflow_id}: see `kvlab status`")
    if row.owner is None:
        return claim(connection, workflow_id, owner, ttl, now)  # released in between
    raise Held(workflow_id, row.owner, row.expires_at, now)


def renew(connection: Connection, lease: Lease, ttl: float, now: float) -> str | None:
    """Extend a lease that nobody took over, even one that has ended; return the pending request."""
    row = connection.execute(
        update(WORKFLOWS).where(*_mine(lease)).values(expires_at=now + ttl).returning(_W.request)
    ).one_or_none()
    if row is None:
        raise LeaseLost(lease.workflow_id, lease.token)
    return None if row.request is None else str(row.request)


def release(connection: Connection, lease: Lease, state: WorkflowState, now: float) -> None:
    """Give the lease back and say how the workflow stands. A workflow that is done stays done."""
    if state not in _ENDS:
        raise IllegalMove(f"a workflow is released as one of {sorted(_ENDS)}, not as {state}")
    done = guard(connection, lease)[0] is WorkflowState.DONE
    if done and state is not WorkflowState.DONE:
        raise IllegalMove(f"workflow {lease.workflow_id} is done and cannot become {state}")
    ended = {} if done else {"state": state.value, "ended_at": now}
    connection.execute(
        update(WORKFLOWS)
        .where(_W.id == lease.workflow_id)
        .values(owner=None, expires_at=None, request=None, **ended)
    )


def request(connection: Connection, workflow_id: int, what: str) -> None:
    """Ask the workflow's controller for something; it hears at its next `renew`."""
    asked = update(WORKFLOWS).where(_W.id == workflow_id).values(request=what)
    if connection.execute(asked).rowcount != 1:
        raise NotFound(f"there is no workflow {workflow_id}: see `kvlab status`")


def guard(connection: Connection, lease: Lease) -> tuple[WorkflowState, str | None]:
    """Lock the workflow against other writers until the transaction ends, or raise LeaseLost.

    PostgreSQL locks the row; on SQLite the transaction has held the file's write lock since BEGIN.
    Nothing is written, so a long workflow text is not copied at every batch.

    Returns:
        the workflow's state, and what `committed` takes: None on SQLite.
    """
    postgres = connection.dialect.name == "postgresql"
    transaction = cast(func.pg_current_xact_id(), Text) if postgres else null()
    row = connection.execute(
        select(_W.state, transaction).where(*_mine(lease)).with_for_update()
    ).one_or_none()
    if row is None:
        raise LeaseLost(lease.workflow_id, lease.token)
    return WorkflowState(row[0]), row[1]


def clock(connection: Connection) -> float | None:
    """PostgreSQL's own time in epoch seconds; None on SQLite, whose users share a machine."""
    if connection.dialect.name != "postgresql":
        return None
    seconds: float = connection.execute(
        select(cast(func.extract("epoch", func.clock_timestamp()), Double))
    ).scalar_one()
    return seconds


def committed(connection: Connection, transaction: str) -> bool:
    """Whether a transaction whose COMMIT was not answered took place.

    Raises:
        StoreError: it is still under way.
    """
    asked = text("SELECT pg_xact_status(CAST(:number AS xid8))")
    status = connection.execute(asked, {"number": transaction}).scalar()
    if status == "in progress":
        raise StoreError(f"transaction {transaction} is still under way: ask again")
    return status == "committed"


def _mine(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (_W.id == lease.workflow_id, _W.token == lease.token, _W.owner == lease.owner)
