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
