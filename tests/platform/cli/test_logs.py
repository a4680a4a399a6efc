"""`kvlab logs -f` ends when there is nobody left who could write."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvlab.db.rows import NewJob
from kvlab.db.states import WorkflowState
from kvlab.db.store import Store
from kvlab.platform.cli.logs import command


@pytest.fixture
def claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, bool], None]:
    """A workflow whose job waits: its lease ends then, and it is released or not."""
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path))

    def make(until: float, stopped: bool) -> None:
        with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
            job = NewJob("a", "a", "noop", {}, {}, {}, (), "a", {})
            number = store.create_workflow("w", "", {}, [job], 1.0)
            lease = store.claim(number, "controller", until - 1.0, 1.0)
            if stopped:
                store.release(lease, WorkflowState.STOPPED, 2.0)

    return make


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("until", "stopped"), [(time.time() + 1e6, True), (2.0, False)], ids=["stopped", "died"]
)
def test_following_ends(
    claimed: Callable[[float, bool], None], until: float, stopped: bool
) -> None:
    claimed(until, stopped)
    command("w", None, True)


def test_that_nothing_was_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVLAB_HOME", str(tmp_path))
    with Store.open(f"sqlite:///{tmp_path}/kvlab.db") as store:
        names = [f"base[seed={seed}]" for seed in range(5)]
        jobs = [NewJob(name, "base", "noop", {}, {}, {}, (), name, {}) for name in names]
        number = store.create_workflow("w", "", {}, jobs, 1.0)
        lease = store.claim(number, "me", 60.0, 1.0)
        with store.batch(lease, 2.0) as batch:
            batch.start(store.load(number).jobs[0].id, "worker")
    command("w", names[0])
    assert capsys.readouterr() == ("", "base[seed=0] wrote nothing\n")
    command("w", names[1])
    assert capsys.readouterr() == ("", "base[seed=1] wrote nothing: not begun yet\n")
    command("w", "base")
    said = "base[seed=0], base[seed=1], base[seed=2] and 2 more wrote nothing\n"
    assert capsys.readouterr() == ("", said)
