"""The stages of a try: how it ends where what everything is compared with is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlab.db.states import JobState, WorkflowState
from kvlab.methods.registry import resolve
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.flow import NoAnswer, Try
from kvlab.platform.trying.plan import QUALITY, RECALL
from kvlab.platform.trying.points import Candidates
from kvlab.platform.trying.run import Ran
from kvlab.platform.trying.subject import read
from kvlab.platform.trying.text import python_source


def failed(job: str, written: dict[str, Any] | None, message: str) -> Any:
    spec = {} if written is None else {"apply": resolve(written).to_dict()}
    return SimpleNamespace(
        job=job, name=job, spec=spec, state=JobState.FAILED, result=None, message=message
    )


class Failing:
    """A runner whose stage ends with these jobs failed."""

    def __init__(self, *jobs: Any) -> None:
        self._workflow: Any = SimpleNamespace(jobs=jobs, row=SimpleNamespace(id=1))

    def stage(self, text: str) -> Ran:
        return Ran(self._workflow, WorkflowState.FAILED, None)


H2O = failed(QUALITY, {"h2o": {}}, "h2o's own")
ASKED = failed(RECALL, {}, "the question's own")
FULL = failed(QUALITY, {}, "the full cache's own")
DATA = failed("data", None, "no data")


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ((H2O, ASKED, FULL), "the full cache's own"),
        ((DATA,), "no data"),
        ((H2O,), "unknown"),
    ],
)
def test_without_the_full_cache_it_ends_with_its_failure(
    jobs: tuple[Any, ...], said: str, checkpoint: Callable[..., Path]
) -> None:
    subject = read(checkpoint(), "tiny")
    asked = Asked((0.5,), "cpu", 128, 16, 4, 2, 0)
    candidates = Candidates(subject, 128, 144, asked.budgets, 4, ("h2o",))
    one = Try(subject, asked, python_source(576), candidates, 1 << 30, 1)
    with pytest.raises(NoAnswer) as ended:
        one.run(Failing(*jobs), lambda text: None)  # type: ignore[arg-type]
    assert str(ended.value) == f"the full cache could not be scored: {said}"
    assert ended.value.exit_code == 1
