"""The front: never empty, never smaller than the front of the means, and only known gains count."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.platform.compare.pareto import front

Point = tuple[float, ...]


def found(
    points: dict[str, Point], width: float = -1.0
) -> tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]:
    """The front where lower is better and differences of `width` or less are not distinguished."""

    def worse(metric: str, arm: str, other: str) -> bool:
        return points[arm][int(metric)] > points[other][int(metric)]

    def better(metric: str, arm: str, other: str) -> bool:
        lead = points[other][int(metric)] - points[arm][int(metric)]
        return lead > max(width, 0.0)

    metrics = [str(number) for number in range(len(next(iter(points.values()))))]
    return front(list(points), metrics, worse, better)


def test_the_textbook_front() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (3.0, 4.0), "d": (4.0, 1.0)}
    members, dominated = found(points)
    assert members == ("a", "b", "d")
    assert dominated == {"c": ("b",)}


def test_equal_arms_share_the_front() -> None:
    points = {"a": (1.0, 1.0), "b": (1.0, 1.0)}
    assert found(points)[0] == ("a", "b")


def test_a_gain_that_is_not_distinguished_beats_nobody() -> None:
    points = {"a": (1.0, 1.0), "b": (1.1, 1.0)}
    assert found(points, 0.5)[0] == ("a", "b")


def test_a_worse_mean_saves_the_other_even_where_it_is_not_distinguished() -> None:
    points = {"a": (1.0, 2.0), "b": (9.0, 1.9)}
    assert found(points, 0.5)[0] == ("a", "b")
    points["b"] = (9.0, 2.1)
    assert found(points, 0.5)[0] == ("a",)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda size: st.lists(
            st.tuples(*[st.integers(0, 6).map(float)] * size), min_size=1, max_size=9
        )
    ),
    st.floats(0, 4),
)
def test_noise_only_enlarges_the_front(drawn: list[Point], width: float) -> None:
    points = {str(number): point for number, point in enumerate(drawn)}
    sharp, _ = found(points)
    wide, dominated = found(points, width)
    assert sharp
    assert set(sharp) <= set(wide)
    assert set(wide).isdisjoint(dominated)
    assert set(wide) | set(dominated) == set(points)
    for loser, winners in dominated.items():
        assert loser not in winners
        # Whoever is dominated is dominated by someone on the front of the means, too.
        assert any(
            all(points[w][i] <= points[loser][i] for i in range(len(drawn[0]))) for w in winners
        )
