"""Ranks of points, and what of an earlier study another one can go on from."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvlab.platform.search.promotion import crowding, promoted, ranked
from kvlab.platform.search.rows import Direction, Row
from kvlab.platform.search.space import Dimension, Space

TWO: dict[str, Direction] = {"loss": "minimize", "speed": "maximize"}


def rows(*points: tuple[float, float]) -> list[Row]:
    return [
        Row(number, {"m": number}, "complete", {"loss": loss, "speed": speed})
        for number, (loss, speed) in enumerate(points)
    ]


def test_one_objective_ranks_by_itself() -> None:
    found = ranked(rows((3, 0), (1, 0), (2, 0)), {"loss": "minimize"})
    assert [row.number for row in found] == [1, 2, 0]


def test_fronts_come_one_behind_the_other_the_lonely_first() -> None:
    # Front: 0, 1, 2, 3 (1 and 2 close to each other, 2 nearer to the lonely end); behind it: 4.
    found = ranked(rows((0, 0), (4, 4), (5, 5), (10, 10), (5, 4)), TWO)
    assert {row.number for row in found[:2]} == {0, 3}
    assert [row.number for row in found[2:]] == [2, 1, 4]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_no_point_stands_behind_one_that_it_dominates(points: list[tuple[int, int]]) -> None:
    found = ranked(rows(*points), TWO)
    assert sorted(row.number for row in found) == list(range(len(points)))
    for place, one in enumerate(found):
        for other in found[:place]:
            (loss, speed), (worse, slower) = points[one.number], points[other.number]
            beats = loss <= worse and speed >= slower and (loss, speed) != (worse, slower)
            assert not beats


def test_infeasible_failed_and_repeated_trials_are_not_ranked() -> None:
    one = rows((1, 1))[0]
    beyond = Row(1, {"m": 1}, "complete", one.objectives, {"loss <= 0": 1.0})
    again = Row(2, {"m": 0}, "complete", one.objectives, source="repeat", same_as=0)
    assert ranked([one, beyond, again, Row(3, {"m": 3}, "failed")], TWO) == [one]


def test_crowding_is_the_sum_of_the_gaps_around() -> None:
    points = np.array([[0.0, 10.0], [1.0, 8.0], [4.0, 5.0], [10.0, 0.0]])
    assert crowding(points) == [np.inf, 0.4 + 0.5, 0.9 + 0.8, np.inf]


def test_what_the_later_study_does_not_vary_is_left_out_and_likes_count_once() -> None:
    trials = [
        asdict(Row(number, values, "complete", {"loss": number}))
        for number, values in enumerate(
            [{"m": 4, "steps": 1}, {"m": 4, "steps": 2}, {"m": 99, "steps": 1}, {"m": 2}, {"m": 3}]
        )
    ]
    space = Space([Dimension("m", "int", 1, 8), Dimension("p", "float", 0, 1)])
    found = promoted(trials, {"loss": "minimize"}, space, 2)
    assert found == [{"m": 4}, {"m": 2}]  # 99 is beyond the later study's range
