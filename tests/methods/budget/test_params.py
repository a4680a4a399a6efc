"""Amounts, shares made rows, what is refused beside an eviction, and PyramidKV's schedule."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab.methods.axis import MethodError
from kvlab.methods.budget.amount import Amount, fixed, least_rows, shortfall
from kvlab.methods.budget.pyramidkv.params import PyramidParams
from kvlab.methods.budget.pyramidkv.schedule import rows
from kvlab.methods.registry import from_dict, resolve


def test_an_amount_in_rows_counts_before_a_share() -> None:
    assert Amount(share=0.25).rows(130) == 32
    assert Amount(share=0.25, tokens=7).rows(130) == 7
    assert Amount(share=0.0001).rows(130) == 1


@pytest.mark.parametrize(
    ("written", "least"),
    [
        ({"streaming_llm": {"sinks": 8}}, 9),
        ({"snapkv": {"window": 16}}, 17),
        ({"h2o": {}}, 2),
        ({"sliding_window": {}}, 1),
        ({"sliding_window": {"window": 8}}, 0),
        ({"full_attention": {}}, 1),
    ],
    ids=str,
)
def test_rows_that_every_layer_needs(written: dict[str, Any], least: int) -> None:
    assert least_rows(resolve(written)) == least


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        ({"uniform": {"share": 0.25}}, 25),
        ({"squeeze_attention": {"share": 0.25, "p": 0.5}}, 25),
        ({"pyramidkv": {"tokens": 12}}, 12),
        ({"per_layer": {"shares": [0.5, 0.25]}}, (50, 25)),
    ],
    ids=str,
)
def test_shares_become_rows_where_a_length_is_known(budget: dict[str, Any], tokens: Any) -> None:
    method = fixed(resolve({"h2o": {}, **budget}), 100)
    assert method["budget"].params.tokens == tokens
    assert from_dict(method.to_dict()).choices == method.choices


@pytest.mark.parametrize("written", ["full_attention", {"sliding_window": {"window": 8}}], ids=str)
def test_a_budget_that_nothing_reads_is_left_alone(written: Any) -> None:
    method = resolve(written)
    assert fixed(method, 100) is method
    assert shortfall(method, 1) is None


@pytest.mark.parametrize(
    ("written", "prompt", "said"),
    [
        (
            {"streaming_llm": {}, "uniform": {"share": 0.01}},
            128,
            "share: 0.01 of a prompt of 128 tokens is 1; streaming_llm keeps at least 5: give "
            "'uniform' a larger share, or tokens",
        ),
        ({"streaming_llm": {}, "uniform": {"share": 0.04}}, 125, None),
        ({"streaming_llm": {}, "uniform": {"share": 0.01, "tokens": 5}}, 128, None),
        (
            {"snapkv": {"window": 8}, "per_layer": {"shares": [0.5, 0.05]}},
            100,
            "shares: 0.05 of a prompt of 100 tokens is 5; snapkv keeps at least 9: give "
            "'per_layer' a larger share, or tokens",
        ),
        ({"snapkv": {"window": 8}, "per_layer": {"tokens": [9, 50]}}, 10, None),
    ],
    ids=str,
)
def test_a_share_that_is_too_few_rows(
    written: dict[str, Any], prompt: int, said: str | None
) -> None:
    assert shortfall(resolve(written), prompt) == said


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (
            {"streaming_llm": {}, "uniform": {"tokens": 4}},
            "at least 5 rows in every layer, fou",
        ),
        ({"snapkv": {}, "squeeze_attention": {"tokens": 32}}, "at least 33 rows in every layer"),
        ({"h2o": {}, "per_layer": {"tokens": [3, 1, 3]}}, "found 1 for layer 1 of those that own"),
        (
            {"streaming_llm": {}, "global_topk": {}},
            "gives tokens no score that layers could",
        ),
        ({"snapkv": {}, "squeeze_attention": {"refresh": 4}}, "evicts nothing after the prompt"),
        (
            {"sliding_window": {"window": 8}, "uniform": {"tokens": 9}},
            "window: 8 says how many rows every layer keeps, and so does 'uniform'",
        ),
        (
            {"full_attention": {}, "pyramidkv": {}},
            "would change nothing: eviction 'full",
        ),
        ({"h2o": {}, "prefill": {"early_exit": True}}, "'h2o' decides by every row of every layer"),
        (
            {"streaming_llm": {}, "squeeze_attention": {}, "prefill": {"early_exit": True}},
            "'squeeze_attention' decides by every row of every layer",
        ),
        ({"h2o": {}, "squeeze_attention": {"p": 1.5}}, "p: must be float from 0.01 to 1.0"),
        ({"h2o": {}, "uniform": {"share": 1.01}}, "share: must be float from 0.0001 to 1.0"),
    ],
    ids=str,
)
def test_what_does_not_go_together(written: dict[str, Any], error: str) -> None:
    with pytest.raises(MethodError, match=error) as raised:
        resolve(written)
    assert "\n" not in str(raised.value)


def test_early_exit_is_left_to_what_does_not_see_every_row() -> None:
    method = resolve({"streaming_llm": {}, "prefill": {"early_exit": True}})
    assert not any(choice.value.observes_all for choice in method.choices.values())


@pytest.mark.parametrize("prompt", [9, 64, 1000, 4096])
@pytest.mark.parametrize("layers", [1, 2, 7, 32])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.55, 0.9, 1.0])
@pytest.mark.parametrize("beta", [1, 4, 20])
@pytest.mark.parametrize("window", [0, 8])
def test_a_pyramid_conserves_its_total_and_never_rises(
    prompt: int, layers: int, share: float, beta: int, window: int
) -> None:
    least = window + 1
    params = PyramidParams(share=share, beta=beta)
    found = rows(params, layers, prompt, window, least)
    assert sum(found) == layers * max(params.rows(prompt), least)
    assert found == sorted(found, reverse=True)
    assert min(found) >= least
    assert max(found) <= max(prompt, least)


@pytest.mark.parametrize(("capacity", "mean"), [(64, 71.5), (96, 102.5), (128, 133.5)])
def test_the_papers_pyramid_keeps_more_than_it_was_given(capacity: int, mean: float) -> None:
    """Its step is floored: + 11.7 %, + 6.8 %, + 4.3 % at 32 layers, as its own code was seen to."""
    found = rows(PyramidParams(tokens=capacity, rule="paper"), 32, 100_000, 8, 9)
    assert sum(found) / 32 == mean
    even = rows(PyramidParams(tokens=capacity), 32, 100_000, 8, 9)
    assert sum(even) == 32 * capacity


def test_the_papers_pyramid_is_snapkv_where_less_than_half_is_cut() -> None:
    params = PyramidParams(tokens=40, rule="paper", beta=4)
    assert rows(params, 4, 63, 8, 9) == [40] * 4
    assert rows(params, 4, 64, 8, 9) == [64, 48, 32, 16]
    assert rows(params, 4, 39, 8, 9) == [40] * 4


def test_kvpress_falls_back_to_uniform_where_the_top_would_lose_its_window() -> None:
    params = PyramidParams(share=0.25, rule="kvpress")
    assert rows(params, 32, 4096, 64, 65) == [1024] * 32
    half = rows(PyramidParams(share=0.5, rule="kvpress"), 32, 4096, 64, 65)
    assert (half[0], half[-1]) == (3994, 102)
