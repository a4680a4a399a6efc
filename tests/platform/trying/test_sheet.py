"""The table of a try: what is known of each point, and what is said of what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvlab.platform.trying import words
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.figures import Divergence, Findings, Speed
from kvlab.platform.trying.plan import QUALITY, RECALL, SPEED
from kvlab.platform.trying.points import Candidates, Point
from kvlab.platform.trying.report import render
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.sheet import Sheet, Sheets
from kvlab.platform.trying.subject import read
from kvlab.platform.trying.table import draw

FULL = Point({}, None)
H2O = Point({"h2o": {}, "uniform": {"share": 0.1}}, 0.1)
WINDOW = Point({"sliding_window": {}, "uniform": {"share": 0.1}}, 0.1)
KEEPING = Point({"streaming_llm": {"generated": "keep"}, "uniform": {"share": 0.1}}, 0.1)
POINTS = (FULL, WINDOW, H2O, KEEPING)
MEMORY = 1 << 30


def diverged(kl: float) -> Divergence:
    return Divergence(kl, (kl, kl, kl * 1.01), 0.5, 1.0, 16, (kl, kl))


@pytest.fixture
def sheets(checkpoint: Callable[..., Path]) -> Sheets:
    subject = read(checkpoint(), "tiny")
    asked = Asked((0.1,), "cpu", 128, 16, 3, 4, 0)
    return Sheets(subject, asked, Candidates(subject, 128, 144, (0.1,), 4), MEMORY)


@pytest.fixture
def findings() -> Findings:
    found = Findings()
    for point, kl in zip(POINTS, (0.0, 0.2, 0.1, 0.01), strict=True):
        found.divergence[point.key] = diverged(kl)
    return found


def rows(sheet: Sheet) -> dict[str, Row]:
    return {row.point.key: row for row in sheet.rows}


def printed(sheet: Sheet, width: int = 120) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(draw(sheet))
    return out.getvalue()


def test_bytes_are_predicted_until_they_were_measured(sheets: Sheets, findings: Findings) -> None:
    before = rows(sheets.make(POINTS, findings))
    assert all(row.predicted for row in before.values())
    assert before[FULL.key].of_full == 1
    assert before[WINDOW.key].of_full == pytest.approx(13 / 144, rel=0.05)
    findings.speed[FULL.key] = Speed(72_000, 0.1, 100, 90, 110)
    findings.speed[WINDOW.key] = Speed(7_200, 0.1, 100, 90, 110)
    after = rows(sheets.make(POINTS, findings))
    assert after[WINDOW.key].kv_bytes == 7_200
    assert after[WINDOW.key].of_full == pytest.approx(0.1)
    assert not after[WINDOW.key].predicted
    assert after[H2O.key] == before[H2O.key]
    room = MEMORY - sheets.make(POINTS, findings).weights
    assert after[WINDOW.key].sequences == room // 7_200


def test_what_holds_more_than_its_budget_comes_after_and_is_not_the_best(
    sheets: Sheets, findings: Findings
) -> None:
    sheet = sheets.make(POINTS, findings)
    own, tenth = sheet.groups
    assert [row.point for row in own.rows] == [FULL]
    assert [row.point for row in tenth.rows] == [H2O, WINDOW, KEEPING]
    assert [row.mark for row in tenth.rows] == ["best", "", ""]
    assert [row.over for row in tenth.rows] == [False, False, True]
    (said,) = words.verdicts(sheet)
    assert said.startswith("10 %: h2o is nearest to the full cache (KL 0.1")
    assert "nearer, in" in said


def test_a_point_that_cannot_be_scored_says_so_and_leaves_the_table_whole(
    sheets: Sheets, findings: Findings
) -> None:
    whole = printed(sheets.make((FULL, WINDOW), findings))
    del findings.divergence[H2O.key]
    findings.failed[QUALITY, H2O.key] = f"no memory: {'very ' * 60}much was asked\nTraceback"
    sheet = sheets.make((FULL, WINDOW, H2O), findings)
    assert [row.mark for row in sheet.groups[1].rows] == ["best", ""]
    text = printed(sheet)
    assert text.splitlines()[0].split() == whole.splitlines()[0].split()
    assert max(map(len, text.splitlines())) < 100
    assert next(line.split() for line in text.splitlines() if "h2o" in line) == ["h2o", "failed"]
    (note,) = (line for line in words.footnotes(sheet) if line.startswith("failed"))
    assert note.startswith("failed: h2o, 10 %: no memory")
    assert "Traceback" not in note
    assert "no memory" in render(sheet, "try-tiny", "version: 1", 7)


@pytest.mark.parametrize("job", [RECALL, SPEED])
def test_a_point_that_was_scored_keeps_its_numbers_whatever_failed_after(
    job: str, sheets: Sheets, findings: Findings
) -> None:
    plain = sheets.make(POINTS, findings)
    findings.failed[job, H2O.key] = "no memory"
    sheet = sheets.make(POINTS, findings)
    assert printed(sheet) == printed(plain)
    assert "not all measured: h2o, 10 %: no memory" in list(words.footnotes(sheet))
    assert rows(sheet)[H2O.key] == replace(rows(plain)[H2O.key], lacking="no memory")


def test_what_failed_once_and_was_done_later_did_not_fail(findings: Findings) -> None:
    apply: dict[str, Any] = {"apply": {}}
    result = {
        "divergence": {
            "kl": 0.5,
            "top1_agreement": 0.5,
            "identical_tokens": 1.0,
            "prompts": {"generate": 16},
            "windows": {"kl": [0.5, 0.5]},
            "by_position": {"kl": [None, 0.5]},
        }
    }
    findings.failed = {(QUALITY, FULL.key): "no memory", (SPEED, FULL.key): "no time"}
    findings.add(QUALITY, apply, result)
    assert findings.failed == {(SPEED, FULL.key): "no time"}
    assert findings.divergence[FULL.key].kl == 0.5
