"""What `kvlab run` and `resume` show while a workflow runs, and how they end."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvlab import KvlabError
from kvlab.db.states import Cause, JobState, WorkflowState

if TYPE_CHECKING:
    from kvlab.platform.controller.cluster import Remote
    from kvlab.platform.controller.controller import Controller, Outcome
    from kvlab.platform.controller.snapshot import Change, RunningJob, Snapshot
    from kvlab.platform.home import Home
    from kvlab.platform.search.study import StudyView

STYLES = {
    JobState.DONE: "green",
    JobState.FAILED: "bold red",
    JobState.RUNNING: "cyan",
    JobState.QUEUED: "yellow",
    JobState.SKIPPED: "dim",
    JobState.CANCELLED: "dim",
}
REFRESH_SECONDS = 0.25
INTERRUPTED = 130

MOST_LEADING = 5
"""Trials of a front that are shown while a study runs."""

Source = Callable[[int], "Snapshot"]
"""Returns how things stand, with the changes from a number on."""


class View:
    """Follows a workflow: a live table on a terminal, one line a change elsewhere."""

    def __init__(self, source: Source, console: Console) -> None:
        self._source = source
        self._console = console
        self._seen = 0
        self._rates: dict[str, tuple[float, float]] = {}
        self._closed = threading.Event()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._thread = threading.Thread(target=self._follow, name="view", daemon=True)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        with suppress(KvlabError):
            self._update()
        if self._console.is_terminal:
            self._live.update(Text(""), refresh=True)
            self._live.stop()

    def _follow(self) -> None:
        # That a controller on a cluster is gone is said by who waits for its end.
        with suppress(KvlabError):
            while not self._closed.wait(REFRESH_SECONDS):
                self._update()

    def _update(self) -> None:
        snapshot = self._source(self._seen)
        self._seen += len(snapshot.changes)
        for change in snapshot.changes:
            # On a terminal the table shows who runs; elsewhere a line has to.
            if change.note or change.state is not JobState.RUNNING or not self._console.is_terminal:
                self._console.print(line(change), soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(draw(snapshot), refresh=True)


def draw(snapshot: Snapshot) -> Group:
    """Draw the running jobs and the counts."""
    table = Table.grid(padding=(0, 2))
    for job in snapshot.running:
        table.add_row(*_cells(job))
    return Group(table, *map(_study, snapshot.studies), counts(snapshot.counts))


def _study(study: StudyView) -> Text:
    """Say how far a study is, and what leads."""
    text = Text(study.name, "bold")
    ended = sum(count for state, count in study.counts.items() if state != "running")
    said = ", ".join(f"{count} {state}" for state, count in sorted(study.counts.items()))
    text.append(f"  {ended} of {study.trials} trials ({said})" if said else "  its first points")
    if len(study.leading) > 1:
        text.append(f"\n  front of {len(study.leading)}:")
    for line in study.leading[:MOST_LEADING]:
        text.append(f"\n  {line}", "green")
    return text


def counts(found: Any) -> Text:
    """Say how many jobs are in which state."""
    text = Text()
    for state in JobState:
        if found.get(state):
            text.append(f"{found[state]} {state}  ", STYLES.get(state, ""))
    return text


def line(change: Change) -> Text:
    """Say what happened to a job."""
    stopped = change.cause == Cause.STOPPED
    again = "stopped" if stopped else "again"
    state = again if change.state is JobState.QUEUED else str(change.state)
    text = Text(f"{state:>9}  ", STYLES.get(change.state, ""))
    text.append(change.name, "bold")
    if change.reused:
        text.append("  reused")
    elif change.seconds is not None:
        text.append(f"  {change.seconds:.1f} s")
    if change.note is not None:
        text.append(f"  {change.note}")
        return text
    if change.attempt > 1:
        text.append(f"  attempt {change.attempt}")
    if change.cause is not None and change.state is not JobState.DONE and not stopped:
        text.append(f"  {change.cause}: {change.message or ''}")
    return text


def _cells(job: RunningJob) -> tuple[Text, ...]:
    name = Text(job.name, "bold")
    elapsed = max(0.001, time.time() - job.since)
    if job.progress is None or job.progress[1] <= 0:
        return (name, Text(""), Text(clock(elapsed)), Text(""), Text(""))
    done, total, note = job.progress
    share = min(1.0, done / total)
    filled = round(20 * share)
    bar = Text("━" * filled, "cyan").append("━" * (20 - filled), "dim")
    rate = done / elapsed
    left = f"{clock((total - done) / rate)} left" if rate > 0 else ""
    return (name, bar, Text(f"{share:4.0%}"), Text(f"{_short(rate)}/s  {left}"), Text(note))


def clock(seconds: float) -> str:
    """Seconds as 1:05, or 1:01:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


@contextmanager
def interruptible(stop: Callable[[], None], console: Console) -> Iterator[None]:
    """Ctrl-C or SIGTERM once stops cleanly, twice at once, a third time as usual."""
    pressed = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 2:
            raise KeyboardInterrupt
        print(
            "\nStopping: running jobs write a checkpoint (Ctrl-C again: do not wait)"
            if pressed == 1
            else "\nStopping now",
            file=sys.stderr,
        )
        stop()

    before = {one: signal.signal(one, handle) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def watching(controller: Controller | Remote, console: Console, quiet: bool) -> Iterator[None]:
    """Show a controller of this process, and let signals stop it."""
    with interruptible(controller.stop, console):
        if quiet:
            yield
        else:
            with View(controller.snapshot, console):
                yield


def finish(home: Home, outcome: Outcome, console: Console, as_json: bool) -> None:
    """Print how it ended, and exit with 0 (done), 1 (jobs failed) or 130 (stopped)."""
    if as_json:
        print(json.dumps(to_json(home, outcome.workflow, outcome.mirror)))
    else:
        console.print(
            Text(f"workflow {outcome.workflow} {outcome.state}: ").append(counts(outcome.counts)),
            soft_wrap=True,
        )
        if outcome.state is not WorkflowState.DONE:
            console.print(f"`kvlab resume {outcome.workflow}` goes on with what is not done")
        if outcome.mirror is not None:
            console.print(outcome.mirror, soft_wrap=True)
    if outcome.state is WorkflowState.STOPPED:
        raise typer.Exit(INTERRUPTED)
    if outcome.state is not WorkflowState.DONE:
        raise typer.Exit(1)


def say_done(home: Home, workflow: int, as_json: bool) -> None:
    """Say that nothing is left to do."""
    if as_json:
        print(json.dumps(to_json(home, workflow)))
    else:
        print(f"workflow {workflow} is done: `kvlab compare {workflow}` shows it")


def to_json(home: Home, workflow: int, mirror: str | None = None) -> dict[str, Any]:
    """How a workflow stands, with every job, for machines."""
    from kvlab.db.store import Store

    with Store.open(home.url, read_only=True) as store:
        status = store.status(workflow)
    return {
        "workflow": workflow,
        "name": status.row.name,
        "state": status.row.state,
        "counts": status.counts,
        "mirror": mirror,
        "jobs": [
            {"name": job.name, "state": job.state, "cause": job.cause, "message": job.message}
            for job in status.jobs
        ],
    }
