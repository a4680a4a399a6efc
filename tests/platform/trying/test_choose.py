"""Ranking: within the budget first, by divergence, and no winner where none is distinguished."""

from __future__ import annotations

import pytest

from kvlab.platform.trying.choose import best_evictions, marked, ranked, worth_it
from kvlab.platform.trying.figures import Divergence
from kvlab.platform.trying.points import Point, Stage
from kvlab.platform.trying.row import Row

NAMES = ("sliding_window", "streaming_llm", "h2o", "observed_attention", "snapkv")


def row(
    name: str, *each: float, over: bool = False, budget: float | None = 0.1, stage: Stage = "single"
) -> Row:
    """A row whose prompts diverge by `each`."""
    found = None
    if each:
        found = Divergence(sum(each) / len(each), each, 0.5, 1.0, 8, ())
    point = Point({name: {}}, budget, stage)
    return Row(point, found, None, None, 1.0, True, 0.1, 1, over)


def test_rows_within_the_budget_come_first() -> None:
    rows = [
        row("h2o", 3, 3),
        row("snapkv", 1, 1, over=True),
        row("sliding_window", 2, 2),
        row("fp8"),
    ]
    assert [one.point.label for one in ranked(rows)] == ["sliding_window", "h2o", "snapkv"]


def test_compositions_are_made_of_the_two_best_of_each_budget() -> None:
    rows = [row(name, at, at) for at, name in enumerate(NAMES)]
    rows += [row(name, 9 - at, 9 - at, budget=0.5) for at, name in enumerate(NAMES)]
    rows += [row("int8", 0, 0, budget=None)]
    assert best_evictions(rows) == {0.1: list(NAMES[:2]), 0.5: list(NAMES[:-3:-1])}


def test_one_that_is_told_apart_is_worse_and_one_that_is_not_is_tied() -> None:
    rows = marked(
        [
            row("h2o", 1.0, 1.1, 0.9),
            row("snapkv", 2.0, 2.1, 2.0),
            row("sliding_window", 0.9, 1.2, 1.3),
        ]
    )
    assert [one.mark for one in rows] == ["best", "", "tied"]


def test_equal_points_are_tied_and_a_constant_difference_is_none() -> None:
    rows = marked([row("h2o", 1.0, 2.0), row("snapkv", 1.0, 2.0), row("streaming_llm", 2.0, 3.0)])
    assert [one.mark for one in rows] == ["best", "tied", ""]


def test_what_is_over_the_budget_wins_only_where_nothing_keeps_within() -> None:
    rows = marked([row("h2o", 5.0, 5.1), row("snapkv", 1.0, 1.1, over=True)])
    assert [one.mark for one in rows] == ["best", ""]
    assert [one.mark for one in marked(rows[1:])] == ["best"]
    assert marked([row("h2o")])[0].mark == ""


@pytest.mark.parametrize(("quick", "most"), [(False, 4), (True, 2)])
def test_each_budgets_best_are_measured_with_the_best_single_among_them(
    quick: bool, most: int
) -> None:
    own = [row("int8", 0, 0, budget=None), row("fp8", budget=None)]
    composed = [row(name, at, at, stage="composed") for at, name in enumerate(NAMES)]
    rows = [*own, *composed, row("kivi", 7, 7), row("int8", 8, 8)]
    chosen = [point.label for point in worth_it(rows, quick)]
    assert chosen == ["int8", *NAMES[: most - 1], "kivi"]
