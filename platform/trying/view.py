"""What a try shows while it runs: the table as it grows, a progress bar, and what runs now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvlab import KvlabError
from kvlab.db.states import JobState
from kvlab.db.store import Store
from kvlab.platform.cli.live import clock, interruptible
from kvlab.platform.home import Home
from kvlab.platform.trying.figures import Findings
from kvlab.platform.trying.points import percent
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.sheet import Sheet
from kvlab.platform.trying.table import COLUMNS, NONE, draw

if TYPE_CHECKING:
    from kvlab.platform.controller.controller import Controller
    from kvlab.platform.controller.snapshot import Snapshot

REFRESH_SECONDS = 0.25
WIDTH = 24


class Screen:
    """Follows the stages of a try on a console.

    Args:
        sheet: makes the table of what is found so far.
        total: jobs that the try is expected to have, over all stages.
    """

    def __init__(
        self,
        home: Home,
        console: Console,
        sheet: Callable[[Findings], Sheet],
        total: int,
        quiet: bool,
    ) -> None:
        self._home, self._console, self._sheet = home, console, sheet
        self._quiet = quiet
        self.total = total
        self._begun = time.monotonic()
        self._first: int | None = None
        self._told: set[tuple[str, str]] = set()

    @contextmanager
    def watch(self, controller: Controller) -> Iterator[None]:
        """Show a controller of this process while it runs, and let signals stop it."""
        with interruptible(controller.stop, self._console):
            if self._quiet:
                yield
                return
            with _Following(self, controller):
                yield

    def read(self, workflow: int) -> Findings:
        """What the store holds of a workflow now."""
        findings = Findings()
        with Store.open(self._home.url, read_only=True) as store:
            findings.read(store.load(workflow).jobs)
        return findings

    def lines(self, findings: Findings) -> Iterator[str]:
        """A line for each point of which more is known than was said."""
        for group in self._sheet(findings).groups:
            for row in group.rows:
                known = "measured" if row.speed is not None else "scored"
                if (row.point.key, known) not in self._told:
                    self._told |= {(row.point.key, known), (row.point.key, "scored")}
                    yield line(row)

    def picture(self, findings: Findings, snapshot: Snapshot) -> RenderableType:
        """The table so far, over the bar."""
        table = draw(self._sheet(findings))
        return Group(table, Text(""), self._bar(snapshot))

    def _bar(self, snapshot: Snapshot) -> Text:
        done = snapshot.counts.get(JobState.DONE, 0)
        self._first = done if self._first is None else self._first
        total = max(self.total, sum(snapshot.counts.values()))
        filled = round(WIDTH * done / max(1, total))
        text = Text("━" * filled, "cyan").append("━" * (WIDTH - filled), "dim")
        elapsed = time.monotonic() - self._begun
        text.append(f"  {done} of about {total} jobs  {clock(elapsed)}")
        if new := done - self._first:
            text.append(f", about {clock((total - done) * elapsed / new)} left")
        for job in snapshot.running:
            text.append(f"\n  {job.name}", "bold")
            if job.progress is not None:
                at, of, note = job.progress
                text.append(f"  {at:g} of {of:g} {note}", "dim")
        return text


class _Following:
    """The thread that shows one stage."""

    def __init__(self, screen: Screen, controller: Controller) -> None:
        self._screen, self._controller = screen, controller
        self._console = screen._console
        self._seen = -1
        self._findings = Findings()
        self._closed = threading.Event()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._thread = threading.Thread(target=self._follow, name="view", daemon=True)

    def __enter__(self) -> _Following:
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
        while not self._closed.wait(REFRESH_SECONDS):
            with suppress(KvlabError):
                self._update()

    def _update(self) -> None:
        snapshot = self._controller.snapshot()
        ended = len(snapshot.changes)
        if ended != self._seen:
            self._findings, self._seen = self._screen.read(snapshot.workflow), ended
        if self._console.is_terminal:
            self._live.update(self._screen.picture(self._findings, snapshot), refresh=True)
            return
        for said in self._screen.lines(self._findings):
            self._console.print(said, soft_wrap=True, markup=False, highlight=False)


def line(row: Row) -> str:
    """One point on one line: what is known of it."""
    at = "" if row.point.budget is None else f" at {percent(row.point.budget)}"
    if row.failed:
        return f"{row.point.label}{at}: failed: {row.failed}"
    known = [f"{title} {text}" for title, show in COLUMNS if (text := show(row)) != NONE]
    return f"{row.point.label}{at}: {', '.join(known)}"
