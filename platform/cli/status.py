"""`kvlab status`: what there is and how it stands."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvlab.db.states import JobState
from kvlab.platform.controller.running import WAITED

if TYPE_CHECKING:
    from kvlab.db.rows import JobStatus, Status, WorkflowRow
    from kvlab.platform.home import Home


def command(
    workflow: Annotated[
        str | None,
        typer.Argument(help="Name (its newest run) or number; without: all.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show workflows, or the jobs of one with their attempts."""
    from kvlab.db.errors import NoStore
    from kvlab.db.store import Store
    from kvlab.platform.cli.console import console as make_console
    from kvlab.platform.cli.which import find, nothing
    from kvlab.platform.home import Home

    home = Home.find()
    console = make_console()
    if workflow is None:
        try:
            with Store.open(home.url, read_only=True) as store:
                rows = store.workflows()
        except NoStore:
            rows = []
        if as_json:
            print(json.dumps([_workflow(row) for row in rows]))
        elif not rows:
            print(nothing(home))
        else:
            _print_all(rows, console)
        return
    number = find(home, workflow)
    with Store.open(home.url, read_only=True) as store:
        status = store.status(number)
    if as_json:
        print(json.dumps({**_workflow(status.row), "counts": status.counts, "jobs": _jobs(status)}))
    else:
        _print_one(home, status, console)


def standing(row: WorkflowRow, now: float) -> str:
    """The state in words: a lease that ran out means that the controller died."""
    if row.state == "running" and (row.expires_at is None or row.expires_at < now):
        return f"interrupted: `kvlab resume {row.id}` goes on"
    return str(row.state)


def _print_all(rows: list[WorkflowRow], console: Any) -> None:
    from rich.table import Column, Table

    table = Table("", Column("workflow", overflow="fold"), "state", "begun", box=None)
    for row in rows:
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created_at))
        table.add_row(str(row.id), row.name, standing(row, time.time()), begun)
    console.print(table)


def _print_one(home: Home, status: Status, console: Any) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from kvlab.platform.cli.live import STYLES, counts

    row = status.row
    console.print(f"{row.id} {row.name}: {standing(row, time.time())}", markup=False)
    name, remark = Column("job", overflow="fold"), Column("", overflow="fold")
    short = [Column(one, no_wrap=True) for one in ("kind", "state", "attempt", "seconds")]
    table = Table(name, *short, remark, box=None)
    states = [_state(home, job) for job in status.jobs]
    for job, state in zip(status.jobs, states, strict=True):
        table.add_row(
            Text(job.name),
            job.kind,
            Text(state, STYLES.get(state, "")),
            str(job.attempt or ""),
            _seconds(job, state),
            Text(_remark(job)),
        )
    console.print(table)
    console.print(counts(Counter(states)))


def _state(home: Home, job: JobStatus) -> JobState:
    """The job's state; one that waits in a worker, behind another job, is still queued."""
    spool = home.spool(job.id, job.attempt)
    begun = spool.exists() or not spool.parent.is_dir()
    return JobState.QUEUED if job.state is JobState.RUNNING and not begun else job.state


def _seconds(job: JobStatus, state: JobState) -> str:
    given_back = job.message == WAITED
    if job.started_at is None or job.reused_from is not None or given_back:
        return ""
    if state is not job.state:
        return ""
    return f"{(job.ended_at or time.time()) - job.started_at:.1f}"


def _remark(job: JobStatus) -> str:
    if job.reused_from is not None:
        return f"reused from job {job.reused_from}"
    if job.cause is None or job.cause == "done" or job.message == WAITED:
        return ""
    if job.cause == "stopped":
        return str(job.cause)
    return f"{job.cause}: {job.message or ''}"


def _workflow(row: WorkflowRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "live": row.expires_at is not None and row.expires_at > time.time(),
        "created_at": row.created_at,
        "ended_at": row.ended_at,
    }


def _jobs(status: Status) -> list[dict[str, Any]]:
    names = (
        "id", "name", "job", "kind", "state", "attempt", "cause", "message",
        "reused_from", "started_at", "ended_at",
    )  # fmt: skip
    return [{name: getattr(job, name) for name in names} for job in status.jobs]
