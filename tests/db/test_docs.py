"""docs/store.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvlab.db.engine import IDLE_SECONDS, WAIT_SECONDS
from kvlab.db.states import MOVES, REUSABLE, Cause, JobState, WorkflowState
from kvlab.db.tables import METADATA


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[2] / "docs" / "store.md").read_text()


def drawn(diagram: str) -> set[tuple[str, str]]:
    return set(re.findall(r"^ +(\w+) --> (\w+)", diagram, re.MULTILINE))


def test_the_diagrams_show_every_move_and_no_other(page: str) -> None:
    jobs, workflows = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    legal = {(str(a), str(b)) for a, to in MOVES.items() for b in to}
    assert drawn(jobs) == legal | {(str(state), "done") for state in REUSABLE}
    ends = set(WorkflowState) - {WorkflowState.RUNNING}
    again = ends - {WorkflowState.DONE}
    assert drawn(workflows) == {("running", str(s)) for s in ends} | {
        (str(s), "running") for s in again
    }


def test_the_page_lists_every_table_with_every_column(page: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert set(rows) == set(METADATA.tables)
    for name, text in rows.items():
        words = set(re.findall(r"`(\w+)`", text)) - {"checkpoint", "result"}
        assert words | {"result"} >= {c.name for c in METADATA.tables[name].columns}, name
        assert words <= {c.name for c in METADATA.tables[name].columns}, name


def test_the_page_names_every_cause_and_wait(page: str) -> None:
    assert re.findall(r"`(\w+)`", page.partition("causes ")[2].partition(". ")[0]) == list(Cause)
    assert f"waits {WAIT_SECONDS} s" in page
    assert f"idle for {IDLE_SECONDS} s" in page
    assert all(str(state) in page for state in JobState)
