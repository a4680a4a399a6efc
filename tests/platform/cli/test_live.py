"""What a person sees while a workflow runs: a line a change, or a table that stays in place."""

from __future__ import annotations

import io
import os
import signal
import time

from rich.console import Console

from kvlab import KvlabError
from kvlab.db.states import JobState
from kvlab.platform.cli.live import View, draw, interruptible, line
from kvlab.platform.controller.snapshot import Change, RunningJob, Snapshot


def text(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def test_a_change_is_one_line():
    done = Change("a[seed=0]", JobState.DONE, 1, "done", None, 1.25)
    assert text(line(done)).split() == ["done", "a[seed=0]", "1.2", "s"]
    again = Change("a", JobState.QUEUED, 2, "node_lost", "the worker process died", 3.0)
    assert "again  a  3.0 s  attempt 2  node_lost: the worker process died" in text(line(again))
    stopped = Change("a", JobState.QUEUED, 1, "stopped", "Stopped", 46.2)
    assert text(line(stopped)).split() == ["stopped", "a", "46.2", "s"]
    reused = Change("a", JobState.DONE, 0, None, None, None, reused=True)
    assert "reused" in text(line(reused))


def test_running_jobs_show_share_rate_and_time_left():
    since = time.time() - 10.0
    jobs = (
        RunningJob("base", 1, since, (50_000.0, 200_000.0, "loss 3.2")),
        RunningJob("speed", 1, since, None),
    )
    counts = {JobState.RUNNING: 2, JobState.DONE: 3, JobState.FAILED: 0}
    drawn = text(draw(Snapshot(1, counts, jobs, ())))
    assert "25%" in drawn
    assert "5.0k/s" in drawn
    assert "0:30 left" in drawn or "0:29 left" in drawn
    assert "loss 3.2" in drawn
    assert "2 running" in drawn
    assert "failed" not in drawn


def test_elsewhere_than_on_a_terminal_every_change_is_printed_once():
    changes = [Change(f"job{n}", JobState.DONE, 1, "done", None, 0.0) for n in range(5)]
    console = Console(file=io.StringIO(), width=120)

    def source(after):
        return Snapshot(1, {JobState.DONE: 5}, (), tuple(changes[after:]))

    with View(source, console):
        pass
    lines = console.file.getvalue().splitlines()
    assert [one.split()[1] for one in lines] == [change.name for change in changes]


def test_a_source_that_is_gone_ends_the_view_without_a_word(capsys):
    def source(after):
        raise KvlabError("the controller is gone")

    with View(source, Console(file=io.StringIO())) as view:
        view._thread.join(10.0)
        assert not view._thread.is_alive()
    assert capsys.readouterr().err == ""


def test_an_interrupt_stops_and_handlers_come_back(capsys):
    asked = []
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda: asked.append("stop"), Console()):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == ["stop", "stop"]
    assert signal.getsignal(signal.SIGINT) is before
    assert "write a checkpoint" in capsys.readouterr().err
