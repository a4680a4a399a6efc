"""What a bench line says about its targets, and how it is printed."""

from __future__ import annotations

import pytest

from kvlab.platform.bench.line import Line, interleaved
from kvlab.platform.bench.table import render


def test_the_ratio_says_how_many_times_better() -> None:
    assert Line("rate", "jobs/s", 40.0, 2.0).ratio == 20.0
    assert Line("time", "s", 2.0, 40.0, better="less").ratio == 20.0
    assert Line("alone", "s", 2.0).ratio is None


@pytest.mark.parametrize(
    ("line", "met"),
    [
        (Line("no target", "s", 1.0), None),
        (Line("fast enough", "jobs/s", 40.0, 2.0, least_ratio=20.0), True),
        (Line("too slow", "jobs/s", 39.0, 2.0, least_ratio=20.0), False),
        (Line("short", "s", 0.4, better="less", limit=0.5), True),
        (Line("long", "s", 0.6, better="less", limit=0.5), False),
        (Line("both", "points/s", 6000.0, 300.0, least_ratio=10.0, limit=5000.0), True),
        (Line("ratio alone", "points/s", 4000.0, 300.0, least_ratio=10.0, limit=5000.0), False),
        (Line("void", "jobs/s", 40.0, 2.0, least_ratio=20.0, void="outputs differ"), False),
    ],
)
def test_targets(line: Line, met: bool | None) -> None:
    assert line.met is met


def test_a_void_line_shows_its_reason_and_no_ratio() -> None:
    table = render([Line("rate", "jobs/s", 40.0, 2.0, beside="Tune", void="outputs differ")])
    assert "VOID: outputs differ" in table
    assert "20.00x" not in table
    assert "40 jobs/s" in table
    assert "2 (Tune)" in table


def test_actions_take_turns_and_warm_up_is_left_out() -> None:
    calls: list[str] = []
    first, second = interleaved(
        lambda: calls.append("a"), lambda: calls.append("b"), warmup=1, repeats=3
    )
    assert calls == ["a", "b"] * 4
    assert len(first) == len(second) == 3
