"""The values of the sharing and prefill axes: how they shape a decoder, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.prefill.params import AutomaticPrefill, Prefill, prefill_of
from kvlab.methods.registry import REGISTRY, from_dict, resolve
from kvlab.methods.sharing.layer_types import write_layer_types
from kvlab.methods.sharing.params import CrossLayerParams

SIX = DecoderConfig(vocab_size=16, **llama(32, 6, 4, 4, 48))

SHAPED: list[tuple[Any, str]] = [
    ("cross_layer", "0_1_2_2_2_2"),
    ({"cross_layer": {"layout": "sandwich_top"}}, "0_4_4_4_4_5"),
    ({"cross_layer": {"layout": "lasagna_top", "kv_layers": 2}}, "2_2_2_5_5_5"),
    ({"cross_layer": {"layout": "lasagna_top", "kv_layers": 2, "keep_first": True}}, "0_2_2_5_5_5"),
    ({"cross_layer": {"layers": [1, 1, 3, 3, 5, 5]}}, "1_1_3_3_5_5"),
    ({"cross_layer": {"layers": "5_5_5_5_5_5", "keep_first": True}}, "0_5_5_5_5_5"),
    ("lckv", "0_4_4_4_4_5"),
    ({"lckv": {"warmup_layers": 3}}, "0_1_4_4_4_5"),
    ({"lckv": {"warmup_layers": 0}}, "5_5_5_5_5_5"),
    ({"lckv": {"warmup_layers": 0, "keep_first": True}}, "0_5_5_5_5_5"),
    ("cla", "0_0_2_2_4_4"),
    ({"cla": {"group": 4}}, "0_0_0_0_4_4"),
    ({"cla": {"group": 3, "leading": 1}}, "0_1_1_1_4_4"),
    ("yoco", "0_1_2_3_3_3"),
    ({"yoco": {"kv_layers": 2}}, "0_1_1_1_1_1"),
    ("gqa", "0_1_2_3_4_5"),
    ("own", "0_1_2_3_4_5"),
]


@pytest.mark.parametrize(("written", "expected"), SHAPED, ids=str)
def test_the_map_that_a_value_gives(written: Any, expected: str) -> None:
    assert write_layer_types(resolve(written).acting(SIX).kv_of) == expected


@pytest.mark.parametrize("written", [written for written, _ in SHAPED], ids=str)
def test_params_survive_json_and_are_hashable(written: Any) -> None:
    method = resolve(written)
    again = from_dict(json.loads(json.dumps(method.to_dict())))
    assert again.choices == method.choices
    assert again.to_dict() == method.to_dict()
    assert hash(again["sharing"].params) == hash(method["sharing"].params)
    shaped = method.acting(SIX)
    assert DecoderConfig.from_dict(json.loads(json.dumps(shaped.to_dict()))) == shaped
    assert hash(shaped) == hash(again.acting(SIX))


def test_one_map_has_one_spelling() -> None:
    """Identities are made of it."""
    spellings = [(0, 0, 2), [0, 0, 2], "0_0_2", "00_0_02"]
    assert {CrossLayerParams(layers=s).layers for s in spellings} == {"0_0_2"}  # type: ignore[arg-type]
    assert CrossLayerParams() == CrossLayerParams(layout="pizza_bottom")
    assert replace(CrossLayerParams(layers="0_0"), strict=True).layout is None


def test_passes_and_strictness_reach_the_decoder() -> None:
    written = {"forward_passes": 3, "backward_passes": 1, "sequential": True, "strict": True}
    sharing = resolve({"lckv": written}).acting(SIX).sharing
    assert sharing is not None
    assert asdict(sharing) == {"kv_of": (0, 4, 4, 4, 4, 5), **written}
    assert resolve({"cla": {"strict": True}}).acting(SIX).sharing.strict  # type: ignore[union-attr]


def test_windows_of_marked_layers_and_of_the_lower_half() -> None:
    mixed = {"cross_layer": {"layers": "0s_0_2s_2_4_4", "window": 8}}
    assert resolve(mixed).acting(SIX).windows == (8, None, 8, None, None, None)
    assert resolve({"yoco": {"window": 5}}).acting(SIX).windows == (5, 5, 5, None, None, None)
    assert resolve("cla").acting(SIX).windows is None


def test_a_window_narrows_what_the_decoder_has() -> None:
    windowed = SIX.with_(windows=(4, None, 9, 4, 9, None))
    assert resolve({"yoco": {"window": 6}}).acting(windowed).windows == (4, 6, 6, 4, 9, None)
    assert resolve("cla").acting(windowed).windows == windowed.windows


@pytest.mark.parametrize(
    ("written", "kv_heads"),
    [
        ("gqa", 2),
        ({"gqa": {"kv_heads": 1}}, 1),
        ({"gqa": {"kv_heads": 4}}, 4),
        ({"cla": {"kv_heads": 2}}, 2),
        ("cla", 4),
    ],
    ids=str,
)
def test_heads(written: Any, kv_heads: int) -> None:
    assert resolve(written).acting(SIX).kv_heads == kv_heads
    assert resolve(written).acting(SIX).heads == 4


def test_a_block_decoder_is_what_is_shaped() -> None:
    method = resolve({"block_transformer": {"block_length": 4}, "cla": {}})
    assert method.inner(SIX).layers == 3
    assert method.acting(SIX).kv_of == (0, 0, 2)
    assert method.acting(SIX).max_positions == SIX.max_positions // 4


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({"cross_layer": {"layout": "pizza_top", "layers": "0_1"}}, "layout: `layers` says it all"),
        ({"cross_layer": {"kv_layers": 2, "layers": "0_1"}}, "kv_layers: `layers` says it all"),
        ({"cross_layer": {"window": 4}}, "window: no layer is marked"),
        ({"cross_layer": {"window": 4, "layers": "0_0_2_2_4_4"}}, "window: no layer is marked"),
        ({"cross_layer": {"layers": "0s_0_2_2_4_4"}}, "window: must be given"),
        ({"cross_layer": {"layers": "0_0"}}, "layers: has 2 entries, the decoder has 6 layers"),
        ({"cross_layer": {"layers": "0_0_0_0_0_6"}}, "layer 5 reads layer 6: must be from 0 to 5"),
        ({"cross_layer": {"kv_layers": 7}}, "kv_layers: must be from 1 to the decoder's 6 layers"),
        ({"lckv": {"warmup_layers": 6}}, "warmup_layers: must be below"),
        ({"cla": {"group": 7}}, "group: must be at most"),
        ({"yoco": {"kv_layers": 7}}, "kv_layers: must be from 1"),
        ({"gqa": {"kv_heads": 3}}, "kv_heads: must divide the model's 4 key/value heads, found 3"),
        ({"lckv": {"kv_heads": 8}}, "kv_heads: must divide"),
    ],
    ids=str,
)
def test_what_is_refused(written: Any, problem: str) -> None:
    choice = resolve(written)["sharing"]
    assert choice.value.check is not None
    (said,) = choice.value.check(choice.params, SIX)
    assert problem in said


def test_two_entries_too_many_are_told_together() -> None:
    params = CrossLayerParams(layout="pizza_top", kv_layers=2, layers="0_1")
    assert len(list(params.problems())) == 2


def test_odd_heads_cannot_be_halved() -> None:
    three = SIX.with_(heads=3, kv_heads=3)
    with pytest.raises(MethodError, match="the model's 3 cannot be halved"):
        resolve("gqa").acting(three)
    assert resolve({"gqa": {"kv_heads": 1}}).acting(three).kv_heads == 1


def test_heads_that_a_parent_no_longer_has() -> None:
    parent = resolve({"gqa": {"kv_heads": 2}}).acting(SIX)
    for written, fits in (("own", False), ("cla", False), ({"cla": {"kv_heads": 1}}, True)):
        choice = resolve(written)["sharing"]
        assert choice.value.convertible is not None
        problems = list(choice.value.convertible(choice.params, SIX, parent))
        assert not problems if fits else "the parent has 2 key/value heads" in problems[0]


def test_prefills() -> None:
    assert prefill_of(None) == prefill_of(resolve({})) == Prefill(None, None)
    chosen = resolve({"prefill": {"passes": 3, "early_exit": False}})
    assert prefill_of(chosen) == Prefill(early_exit=False, passes=3)
    assert resolve({})["prefill"].params == AutomaticPrefill()
    assert chosen.to_dict() == {"prefill": {"prefill": {"early_exit": False, "passes": 3}}}


@pytest.mark.parametrize(
    ("trained", "can"),
    [("own", True), ("cross_layer", True), ("lckv", True), ("cla", True), ("yoco", True),
     ({"cross_layer": {"layout": "pizza_top"}}, False),
     ({"cross_layer": {"layout": "sandwich_middle"}}, True),
     ({"lckv": {"warmup_layers": 1}}, False),
     ({"cross_layer": {"layers": "0_5_5_5_5_4"}}, False)],
    ids=str,
)  # fmt: skip
def test_early_exit_needs_a_last_kv_layer_that_is_run_once(trained: Any, can: bool) -> None:
    config = resolve(trained).acting(SIX)
    for early_exit in (True, False):
        choice = resolve({"prefill": {"early_exit": early_exit}})["prefill"]
        assert choice.value.check is not None
        problems = list(choice.value.check(choice.params, config))
        assert bool(problems) == (early_exit and not can)
        assert all("run in passes" in problem for problem in problems)


def test_all_values_are_there() -> None:
    names = {axis: [v.name for v in REGISTRY.values(axis)] for axis in ("sharing", "prefill")}  # type: ignore[arg-type]
    assert names == {
        "sharing": ["own", "cross_layer", "lckv", "cla", "yoco", "gqa"],
        "prefill": ["automatic_prefill", "prefill"],
    }
