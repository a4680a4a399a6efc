"""The table as printed, against a golden text, and its behaviour on any terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvlab.db.states import Cause, JobState
from kvlab.platform.compare.build import compare
from kvlab.platform.compare.table import draw

GOLDEN = Path(__file__).parent / "golden"


def printed(lab: Any, width: int = 140, **report: Any) -> str:
    comparison = compare(lab.load(lab.save(report or None)))
    out = io.StringIO()
    draw(comparison, Console(file=out, width=width, color_system=None))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def test_the_quickstart_reads_as_it_should(quickstart: Any) -> None:
    assert printed(quickstart) == (GOLDEN / "quickstart.txt").read_text(encoding="utf-8")


def test_trouble_reads_as_it_should(lab: Any) -> None:
    for seed in (0, 1):
        base = lab.train("base", seed)
        lab.evaluate(base, 3.5 + 0.05 * seed, noise=0.02)
        lab.benchmark(base, 100 + 9 * seed)
        close = lab.train("close", seed)
        lab.evaluate(close, 3.5 + 0.06 * seed, noise=0.02)
        lab.benchmark(close, 103, gates={"alone": False})
    dead = lab.train("dead", 0, outcome=(Cause.DIVERGED, "loss is NaN at step 40"))
    lab.evaluate(dead, 0, outcome=JobState.SKIPPED)
    lab.evaluate(base, 3.2, job="other", targets="bb")
    lab.benchmark(base, 50, job="long", prompt=224, generate=32, batches=(1,))
    text = printed(lab)
    assert text == (GOLDEN / "trouble.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(quickstart: Any, width: int) -> None:
    text = printed(quickstart, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "block_length=4" in text.replace("\n", "")


def test_markup_in_names_is_only_text(lab: Any) -> None:
    base = lab.train("base", 0, axes={"x": "[red]no[/red] [link=x]"})
    lab.evaluate(base, 3.5)
    assert "[red]no[/red]" in printed(lab)


def test_a_workflow_without_models_says_so(lab: Any) -> None:
    assert "nothing to compare" in printed(lab)
