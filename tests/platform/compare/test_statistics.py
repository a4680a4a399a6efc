"""The arithmetic against published tables, closed forms and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.platform.compare.statistics import (
    Difference,
    bootstrapped,
    crossed,
    paired,
    separated,
    summarise,
    t_quantile,
)

# Two-sided 95 % and 99 % points of Student's t, from printed tables.
TABLE = [
    (1, 0.975, 12.7062), (2, 0.975, 4.3027), (3, 0.975, 3.1824), (4, 0.975, 2.7764),
    (5, 0.975, 2.5706), (9, 0.975, 2.2622), (10, 0.975, 2.2281), (29, 0.975, 2.0452),
    (60, 0.975, 2.0003), (120, 0.975, 1.9799), (1, 0.995, 63.6567), (2, 0.995, 9.9248),
    (4, 0.995, 4.6041), (10, 0.995, 3.1693), (30, 0.995, 2.7500), (math.inf, 0.975, 1.95996),
    (math.inf, 0.995, 2.57583), (7, 0.9, 1.4149),
]  # fmt: skip
finite = st.floats(-1e3, 1e3, allow_nan=False)


@pytest.mark.parametrize(("df", "p", "expected"), TABLE)
def test_t_quantiles_agree_with_the_tables(df: float, p: float, expected: float) -> None:
    assert t_quantile(p, df) == pytest.approx(expected, abs=6e-5 if expected < 20 else 6e-4)
    assert t_quantile(1 - p, df) == pytest.approx(-expected, abs=6e-4)


def test_t_quantile_has_its_closed_forms() -> None:
    for p in (0.51, 0.6, 0.75, 0.9, 0.99, 0.9999):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("p", "df"), [(0, 1), (1, 1), (0.5, 0), (0.5, -1), (0.5, math.nan)])
def test_t_quantile_refuses_nonsense(p: float, df: float) -> None:
    with pytest.raises(ValueError, match="needs 0 < p < 1"):
        t_quantile(p, df)


def test_a_summary_of_three_seeds() -> None:
    s = summarise([10.0, 11.0, 12.0])
    assert (s.n, s.mean, s.sd) == (3, 11.0, 1.0)
    half = 4.30265 / math.sqrt(3)
    assert (s.low, s.high) == (
        pytest.approx(11 - half, abs=1e-4),
        pytest.approx(11 + half, abs=1e-4),
    )


def test_one_seed_has_no_spread() -> None:
    s = summarise([3.0])
    assert (s.mean, s.sd, s.low, s.high) == (3.0, None, None, None)
    assert not paired([3.0]).distinguished
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_paired_t_of_students_sleep_data() -> None:
    # Student (1908): extra hours of sleep under two drugs; t = 4.0621, 9 degrees of freedom.
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = paired(differences)
    assert found.estimate == pytest.approx(1.58)
    assert (found.low, found.high) == (
        pytest.approx(0.7001, abs=1e-4),
        pytest.approx(2.4599, abs=1e-4),
    )
    assert found.distinguished


def test_crossed_without_window_effects_is_the_paired_t_over_seeds() -> None:
    seeds = np.array([0.3, 0.5, 0.4])
    found = crossed(np.repeat(seeds[:, None], 8, axis=1), np.ones(8))
    simple = paired(list(seeds))
    assert found.estimate == pytest.approx(simple.estimate)
    assert (found.low, found.high) == (pytest.approx(simple.low), pytest.approx(simple.high))


def test_crossed_without_seed_effects_is_the_normal_interval_over_windows() -> None:
    windows = np.random.default_rng(0).normal(0.1, 0.3, 50)
    found = crossed(np.repeat(windows[None, :], 3, axis=0), np.ones(50))
    half = 1.959964 * windows.std(ddof=1) / math.sqrt(50)
    assert found.low == pytest.approx(windows.mean() - half, abs=1e-6)
    assert found.high == pytest.approx(windows.mean() + half, abs=1e-6)


def test_weights_make_the_mean_one_over_targets() -> None:
    table = [[1.0, 2.0], [1.0, 2.0]]
    assert crossed(table, [1.0, 3.0]).estimate == pytest.approx(1.75)
    assert bootstrapped([1.0, 2.0], [1.0, 3.0]).estimate == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("seeds", "windows", "by_seed", "by_window", "rest"),
    [(3, 40, 0.01, 0.05, 0.02), (3, 40, 0.02, 0.0, 0.02), (5, 60, 0.0, 0.0, 0.02)],
)
def test_crossed_covers_the_truth_nineteen_times_in_twenty(
    seeds: int, windows: int, by_seed: float, by_window: float, rest: float
) -> None:
    rng, hits, trials = np.random.default_rng(1), 0, 400
    for _ in range(trials):
        table = (
            rng.normal(0, by_seed, (seeds, 1))
            + rng.normal(0, by_window, (1, windows))
            + rng.normal(0, rest, (seeds, windows))
        )
        found = crossed(table, np.ones(windows))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / trials <= 0.985


def test_the_bootstrap_covers_and_repeats_itself() -> None:
    rng, hits, trials = np.random.default_rng(2), 0, 100
    for _ in range(trials):
        found = bootstrapped(rng.normal(0, 1, 60), np.ones(60))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert hits >= 88
    values = rng.normal(0, 1, 20)
    assert bootstrapped(values, np.ones(20)) == bootstrapped(values, np.ones(20))


def test_one_window_gives_no_interval() -> None:
    assert bootstrapped([0.2], [5.0]) == Difference(0.2, None, None, "one seed, one window")


def test_separated_adds_the_sides_that_face_each_other() -> None:
    found = separated((5.0, 4.0, 7.0), (3.0, 2.5, 3.25))
    assert found.estimate == 2.0
    assert found.low == pytest.approx(2 - math.hypot(1.0, 0.25))
    assert found.high == pytest.approx(2 + math.hypot(2.0, 0.5))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4,)])
def test_crossed_refuses_too_little(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="crossed needs"):
        crossed(np.zeros(shape), np.ones(shape[-1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=2, max_size=8), finite)
def test_an_interval_holds_its_mean_and_moves_with_the_values(
    values: list[float], shift: float
) -> None:
    s, moved = summarise(values), summarise([value + shift for value in values])
    assert s.low is not None
    assert s.high is not None
    assert s.low <= s.mean + 1e-9
    assert s.high >= s.mean - 1e-9
    assert moved.low == pytest.approx(s.low + shift, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(finite, min_size=4, max_size=4), min_size=2, max_size=4))
def test_swapping_the_arms_mirrors_the_interval(table: list[list[float]]) -> None:
    forward = crossed(table, np.ones(4))
    back = crossed([[-value for value in row] for row in table], np.ones(4))
    assert forward.low is not None
    assert back.high is not None
    assert forward.low == pytest.approx(-back.high, abs=1e-6)
    assert forward.distinguished == back.distinguished


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 0.9999), st.floats(0.3, 1e5))
def test_quantiles_rise_with_p_and_fall_with_df(p: float, df: float) -> None:
    assert t_quantile(p, df) >= t_quantile(p, df * 1.5) - 1e-9
    assert t_quantile(min(p + 1e-4, 0.99999), df) >= t_quantile(p, df) - 1e-9
