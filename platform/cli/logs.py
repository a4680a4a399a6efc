"""`kvlab logs`: what jobs wrote."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvlab import KvlabError
from kvlab.db.states import TERMINAL, WorkflowState

if TYPE_CHECKING:
    from kvlab.db.rows import JobStatus, Status, WorkflowRow
    from kvlab.platform.home import Home

FOLLOW_SECONDS = 0.5
NAMED = 3


def command(
    workflow: Annotated[str, typer.Argument(help="Name (its newest run) or number.")],
    job: Annotated[
        str | None,
        typer.Argument(help="A cell, or a job of the YAML; without: all.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends.")] = False,
) -> None:
    """Print what jobs wrote, newest attempts last."""
    from kvlab.db.store import Store
    from kvlab.platform.cli.which import find
    from kvlab.platform.home import Home

    home = Home.find()
    number = find(home, workflow)
    read: dict[Path, int] = {}
    with Store.open(home.url, read_only=True) as store:
        while True:
            status = store.status(number)
            chosen = _chosen(status, job)
            for one in chosen:
                _print(home, number, one, read, titled=len(chosen) > 1)
            if not follow or _over(status.row) or all(one.state in TERMINAL for one in chosen):
                if not any(read.values()):
                    print(_silent(chosen), file=sys.stderr)
                return
            time.sleep(FOLLOW_SECONDS)


def _over(row: WorkflowRow) -> bool:
    """Whether nobody runs the workflow: it ended, or its controller's lease did."""
    lapsed = row.expires_at is not None and row.expires_at < time.time()
    return row.state is not WorkflowState.RUNNING or lapsed


def _chosen(status: Status, job: str | None) -> list[JobStatus]:
    chosen = [one for one in status.jobs if job in (None, one.name, one.job)]
    if not chosen:
        known = ", ".join(dict.fromkeys(one.job for one in status.jobs))
        raise KvlabError(f"workflow {status.row.id} has no job '{job}': it has {known}")
    return chosen


def _silent(chosen: list[JobStatus]) -> str:
    """Say why there is nothing to print."""
    names = ", ".join(one.name for one in chosen[:NAMED])
    more = f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else ""
    if all(one.reused_from is not None for one in chosen):
        return f"{names}{more} wrote nothing: done with the result of an earlier run"
    begun = any(one.attempt for one in chosen)
    return f"{names}{more} wrote nothing" + ("" if begun else ": not begun yet")


def _print(home: Home, workflow: int, job: JobStatus, read: dict[Path, int], titled: bool) -> None:
    for attempt in range(1, job.attempt + 1):
        path = home.log(workflow, job.name, attempt)
        for rank in (path, *sorted(path.parent.glob(f"{_literal(path.stem)}.rank*.log"))):
            if not rank.exists():
                continue
            with rank.open(encoding="utf-8", errors="replace") as file:
                file.seek(read.get(rank, 0))
                text = file.read()
                read[rank] = file.tell()
            if text and titled:
                print(f"==> {rank.stem}")
            sys.stdout.write(text)
    sys.stdout.flush()


def _literal(name: str) -> str:
    """Escape what a glob pattern would take for its own."""
    return name.replace("[", "[[]")
