"""kill -9 of a writer: what it was told is stored stays, what it was in the middle of goes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvlab.db.rows import Lease
from kvlab.db.store import Store

WRITER = """
import itertools, sys
from kvlab.db.rows import Lease
from kvlab.db.store import Store

url, workflow, token, job, mode = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
store, lease = Store.open(url), Lease(workflow, token, "controller")
for step in itertools.count(1):
    with store.batch(lease, 100.0 + step) as batch:
        rows = [(f"{mode}/{key}", step, float(step), step) for key in range(200)]
        assert batch.points(job, 1, rows) == 200
        batch.event(mode, job, 1, {"step": step})
        batch.checkpoint(job, 1, step, f"file:///step{step}")
        if mode == "inside":
            print(step, flush=True)
            sys.stdin.readline()
    print(step, flush=True)
"""


@contextmanager
def writer(url: str, lease: Lease, job: int, mode: str) -> Iterator[subprocess.Popen[str]]:
    arguments = [url, lease.workflow_id, lease.token, job, mode]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_writer_killed_at_any_instant_loses_nothing_it_was_told_is_stored(
    lab: Any, store_url: str
) -> None:
    job = lab.jobs[0]
    lab.start(job)
    draw = random.Random(7)
    for turn in ("first", "second", "third"):
        acknowledged = 0
        with writer(store_url, lab.lease, job, turn) as process:
            assert process.stdout is not None
            for _ in range(draw.randrange(5, 60)):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        with lab.batch():
            pass  # waits for whatever the server still finishes for the dead process
        stored = [p.step for p in lab.store.points(job, [f"{turn}/0"])]
        last = stored[-1]
        assert acknowledged <= last <= acknowledged + 1
        assert stored == list(range(1, last + 1))
        for key in range(200):
            assert [p.step for p in lab.store.points(job, [f"{turn}/{key}"])] == stored
        events = [e.data["step"] for e in lab.store.events(lab.workflow) if e.kind == turn]
        assert events == stored
        assert lab.row(job).checkpoint.step == last


def test_a_writer_killed_inside_a_batch_leaves_nothing_and_no_lock(
    lab: Any, store_url: str
) -> None:
    job = lab.jobs[0]
    lab.start(job)
    before = lab.store.load(lab.workflow)
    for _ in range(2):
        with writer(store_url, lab.lease, job, "inside") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            assert lab.store.load(lab.workflow) == before
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert lab.store.points(job) == []
        assert lab.store.load(lab.workflow) == before
        with lab.batch() as batch:
            batch.event("the next writer")
    with Store.open(store_url) as again:
        assert len(again.events(lab.workflow)) == 2


def test_a_reader_that_comes_alone_finds_what_a_killed_writer_was_told(
    lab: Any, store_url: str
) -> None:
    """Nobody else has the store open: the reader itself brings SQLite's log in order."""
    job = lab.jobs[0]
    lab.start(job)
    lab.store.close()
    with writer(store_url, lab.lease, job, "alone") as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert told == ["1\n", "2\n", "3\n"]
    with Store.open(store_url, read_only=True) as reader:
        stored = [p.step for p in reader.points(job, ["alone/0"])]
    assert stored[:3] == [1, 2, 3]
