"""Theorems of budgets: totals, bounds, the best groups, what a batch changes."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.methods.budget.budget import Budget, Evidence
from kvlab.methods.budget.division import divide
from kvlab.methods.budget.global_topk.budget import GlobalTopK
from kvlab.methods.budget.per_layer.budget import PerLayer
from kvlab.methods.budget.per_layer.params import PerLayerParams
from kvlab.methods.budget.pyramidkv.params import PyramidParams
from kvlab.methods.budget.pyramidkv.schedule import rows as pyramid
from kvlab.methods.budget.squeeze_attention.budget import LEAST_P, SqueezeAttention, shares_of
from kvlab.methods.budget.squeeze_attention.grouping import three_means
from kvlab.methods.budget.squeeze_attention.params import SqueezeParams
from kvlab.methods.budget.uniform.budget import Uniform
from kvlab.methods.budget.uniform.params import UniformParams

quick = settings(max_examples=60, deadline=None, derandomize=True)
cosines = st.lists(
    st.integers(0, 50).map(lambda n: n / 50) | st.floats(0.0, 1.0, width=32),
    min_size=1, max_size=9,
)  # fmt: skip


def evidence(prompt: list[int], layers: int, **more: Any) -> Evidence:
    found = {
        "prompt": torch.tensor(prompt),
        "most": torch.full((len(prompt),), max(prompt) + 8),
        "least": 1,
        "window": 0,
        "readers": tuple((layer,) for layer in range(layers)),
    }
    return Evidence(**(found | more))


@quick
@given(
    st.lists(
        st.lists(st.floats(0.0, 300.0), min_size=4, max_size=4), min_size=1, max_size=3
    ),
    st.lists(st.integers(0, 500), min_size=3, max_size=3),
    st.integers(1, 20),
    st.integers(0, 100),
)  # fmt: skip
def test_a_division_keeps_totals_and_bounds(
    wanted: list[list[float]], totals: list[int], least: int, more: int
) -> None:
    most = least + more
    total = torch.tensor(totals[: len(wanted)])
    rows = divide(torch.tensor(wanted).double(), total, least, most)
    assert rows.sum(1).tolist() == total.clamp(4 * least, 4 * most).tolist()
    assert int(rows.min()) >= least
    assert int(rows.max()) <= most
    for row, asked in zip(rows.tolist(), wanted, strict=True):  # who asks for more never gets less
        for a, b in combinations(range(4), 2):
            assert not (asked[a] > asked[b] + 1e-9 and row[a] < row[b])
    again = divide(torch.tensor(wanted).double(), total, least, most)
    assert torch.equal(rows, again)


@quick
@given(st.lists(st.integers(5, 60), min_size=2, max_size=8))
def test_a_division_that_nothing_bounds_rounds_alone(whole: list[int]) -> None:
    """By less than a row; whole numbers stay."""
    layers = len(whole)
    rows = divide(torch.tensor([whole]).double(), torch.tensor([sum(whole)]), 1, 100)
    assert rows.tolist() == [whole]
    wanted = torch.tensor([[each + 0.75 for each in whole]]).double()
    total = int(wanted.sum())
    scaled = wanted * total / wanted.sum()
    rows = divide(scaled, torch.tensor([total]), 1, 100)
    assert int(rows.sum()) == total
    assert float((rows - scaled).abs().max()) < 1.0
    assert len(rows[0]) == layers


@pytest.mark.parametrize(
    ("wanted", "total", "least", "most", "rows"),
    [
        ([1.0, 1.0, 10.0], 12, 3, 99, [3, 3, 6]),
        ([1.5, 1.5, 1.0], 4, 1, 99, [2, 1, 1]),
        ([30.0, 10.0, 10.0], 50, 1, 20, [20, 15, 15]),
        ([0.0, 0.0, 0.0], 8, 1, 99, [3, 3, 2]),
        ([5.0, 5.0, 5.0], 1, 2, 99, [2, 2, 2]),
        ([5.0, 5.0, 5.0], 99, 2, 7, [7, 7, 7]),
    ],
)
def test_divisions_by_hand(
    wanted: list[float], total: int, least: int, most: int, rows: list[int]
) -> None:
    found = divide(torch.tensor([wanted]).double(), torch.tensor([total]), least, most)
    assert found.tolist() == [rows]


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


@quick
@given(cosines)
def test_three_means_are_the_best_of_all_partings(values: list[float]) -> None:
    """Found by trying every group of every value, not only runs."""
    groups = three_means(values)
    different = sorted(set(values))
    if len(different) == 1:
        assert groups == [0] * len(values)
        return
    if len(different) == 2:
        assert groups == [0 if value == different[0] else 2 for value in values]
        return
    parts = [[v for v, g in zip(values, groups, strict=True) if g == n] for n in range(3)]
    assert max(parts[0]) < min(parts[1])
    assert max(parts[1]) < min(parts[2])
    found = sum(spread(part) for part in parts)
    ordered = sorted(values)
    if len(values) <= 6:
        ways = every_parting(ordered)
    else:
        cuts = combinations(range(1, len(ordered)), 2)
        ways = ([ordered[:a], ordered[a:b], ordered[b:]] for a, b in cuts)
    best = min(sum(spread(part) for part in way) for way in ways)
    assert found <= best + 1e-6


def every_parting(values: list[float]) -> list[list[list[float]]]:
    ways: list[list[list[float]]] = []
    for number in range(3 ** len(values)):
        parts: list[list[float]] = [[], [], []]
        for value in values:
            number, part = divmod(number, 3)
            parts[part].append(value)
        if all(parts):
            ways.append(parts)
    return ways


@quick
@given(cosines, st.floats(0.01, 1.0) | st.none())
def test_squeezed_shares_average_one(values: list[float], p: float | None) -> None:
    shares = shares_of(values, p)
    assert float(shares.mean()) == pytest.approx(1.0)
    third = [group == 2 for group in three_means(values)]
    if not any(third) or all(third):
        assert shares.tolist() == [1.0] * len(values)
        return
    low = {s for s, is_third in zip(shares.tolist(), third, strict=True) if is_third}
    high = {s for s, is_third in zip(shares.tolist(), third, strict=True) if not is_third}
    assert len(low) == len(high) == 1
    assert max(low) <= min(high)
    if p is not None:
        assert low == {p}
    else:
        change = [1 - value for value in values]
        cut = [c for c, is_third in zip(change, third, strict=True) if is_third]
        ratio = (sum(cut) / len(cut)) / (sum(change) / len(change))
        assert max(low) == pytest.approx(min(1.0, max(LEAST_P, ratio)))


@quick
@given(
    st.lists(st.integers(12, 90), min_size=1, max_size=3),
    st.lists(st.floats(0.0, 1.0, width=32), min_size=18, max_size=18),
    st.floats(0.05, 1.0),
    st.sampled_from([0.3, 0.5, 0.9]),
    st.integers(1, 4),
)
def test_squeezed_budgets(
    prompt: list[int], values: list[float], p: float, share: float, least: int
) -> None:
    """A sample's budgets are its own, and add up; those of a batch are those of its mean."""
    found = torch.tensor(values[: 6 * len(prompt)]).view(len(prompt), 6).double()
    asked = evidence(prompt, 6, cosines=found, least=least)
    rows = SqueezeAttention(SqueezeParams(share, p=p)).rows(asked)
    average = [max(least, int(share * length)) for length in prompt]
    assert rows.sum(1).tolist() == [6 * each for each in average]
    assert int(rows.min()) >= least
    for i, length in enumerate(prompt):
        one = evidence(
            [length], 6, cosines=found[i : i + 1], least=least, most=asked.most[i : i + 1]
        )
        alone = SqueezeAttention(SqueezeParams(share, p=p)).rows(one)
        assert torch.equal(alone[0], rows[i])
    weights = torch.tensor(prompt).double()
    mean = (found * weights[:, None]).sum(0) / weights.sum()
    same = evidence(prompt, 6, cosines=mean.expand_as(found), least=least)
    batch = SqueezeAttention(SqueezeParams(share, p=p, per="batch"))
    # Weighting once more may move a mean by a last bit, and a tie to another group.
    if groups_are_clear(mean.tolist()):
        assert torch.equal(
            batch.rows(asked), SqueezeAttention(SqueezeParams(share, p=p)).rows(same)
        )
    assert batch.rows(asked).sum(1).tolist() == [6 * each for each in average]


def groups_are_clear(values: list[float]) -> bool:
    nudged = [value + 1e-12 * (-1) ** i for i, value in enumerate(values)]
    return three_means(values) == three_means(nudged)


def test_a_shared_layer_counts_by_its_most_important_reader() -> None:
    values = torch.tensor([[0.1, 0.9, 0.5, 0.99, 0.98, 0.97]]).double()
    readers = ((0, 1), (2,), (3, 4), (5,))
    params = SqueezeParams(tokens=10, p=0.5)
    shared = SqueezeAttention(params).rows(evidence([99], 4, cosines=values, readers=readers))
    lowest = torch.tensor([[0.1, 0.5, 0.98, 0.97]]).double()
    assert torch.equal(shared, SqueezeAttention(params).rows(evidence([99], 4, cosines=lowest)))
    assert shared.tolist() == [[15, 15, 5, 5]]


def test_narrow_attention_is_unimportant_by_mass() -> None:
    spreads = torch.tensor([[0.9, 0.88, 0.5, 0.1]]).double()
    rows = SqueezeAttention(SqueezeParams(tokens=10, p=0.4, importance="mass"))
    assert rows.rows(evidence([99], 4, spread=spreads)).tolist() == [[12, 12, 12, 4]]


@quick
@given(
    st.integers(1, 12), st.integers(8, 400), st.integers(1, 300), st.integers(1, 40),
    st.integers(0, 16),
)  # fmt: skip
def test_a_pyramid_keeps_its_total_and_falls(
    layers: int, prompt: int, tokens: int, beta: int, window: int
) -> None:
    least = window + 1
    found = pyramid(PyramidParams(tokens=tokens, beta=beta), layers, prompt, window, least)
    average = max(tokens, least)
    assert sum(found) == layers * average
    assert found == sorted(found, reverse=True)
    assert min(found) >= least
    if average < prompt and least < average:
        assert max(found) <= prompt
    steps = [a - b for a, b in pairwise(found)]
    assert not steps or max(steps) - min(steps) <= 2


def test_a_pyramid_by_hand() -> None:
    exact = PyramidParams(tokens=40, beta=4)
    assert pyramid(exact, 4, 400, 0, 1) == [70, 50, 30, 10]
    assert pyramid(exact, 4, 60, 0, 1) == [60, 47, 33, 20]
    assert pyramid(exact, 4, 40, 0, 1) == [40] * 4


@quick
@given(
    st.lists(st.integers(4, 12), min_size=1, max_size=3), st.integers(2, 6), st.integers(0, 999),
    st.integers(1, 3),
)  # fmt: skip
def test_one_top_k_over_layers(prompt: list[int], tokens: int, seed: int, least: int) -> None:
    """Each layer keeps as many rows as it has among the best of all, counted by hand."""
    layers, rows = 3, max(prompt)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(len(prompt), layers, rows, generator=generator)
    for sample, length in enumerate(prompt):
        ranks[sample, :, : rows - length] = float("-inf")
    asked = evidence(
        prompt, layers, ranks=ranks, least=least, most=torch.full((len(prompt),), rows)
    )
    found = GlobalTopK(UniformParams(tokens=tokens)).rows(asked)
    for sample, length in enumerate(prompt):
        total = layers * min(max(tokens, least), rows)
        assert int(found[sample].sum()) == total
        pairs = [
            (float(ranks[sample, layer, row]), layer)
            for layer in range(layers) for row in range(rows - length, rows)
        ]  # fmt: skip
        best = [layer for _, layer in sorted(pairs, reverse=True)[:total]]
        counts = [best.count(layer) for layer in range(layers)]
        if min(counts) >= least and len(best) == total:
            assert found[sample].tolist() == counts
        assert int(found[sample].min()) >= least


def test_uniform_and_listed_budgets() -> None:
    asked = evidence([10, 40], 3, least=4)
    pairs: list[tuple[Budget, list[list[int]]]] = [
        (Uniform(UniformParams(share=0.5)), [[5] * 3, [20] * 3]),
        (Uniform(UniformParams(share=0.1)), [[4] * 3, [4] * 3]),
        (Uniform(UniformParams(tokens=7)), [[7] * 3, [7] * 3]),
        (PerLayer(PerLayerParams(tokens=(9, 1, 999))), [[9, 4, 48], [9, 4, 48]]),
        (PerLayer(PerLayerParams(shares=(0.5, 1.0, 0.1))), [[5, 10, 4], [20, 40, 4]]),
    ]
    for budget, rows in pairs:
        assert budget.rows(asked).tolist() == rows
