"""The named maps: the paper's examples, and what holds for any number of layers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.config import DecoderConfig, Sharing, llama
from kvlab.methods.decoder.segments import exit_layer, segments
from kvlab.methods.sharing.layer_types import write_layer_types
from kvlab.methods.sharing.layouts import (
    LAYOUTS,
    Layout,
    cla_map,
    keep_first,
    kv_map,
    lckv_map,
    yoco_map,
)

# Fact sheet, section 1.4.
EXAMPLES = {
    (9, 3): {
        "pizza_bottom": "0_1_2_2_2_2_2_2_2",
        "pizza_top": "0_1_8_8_8_8_8_8_8",
        "pizza_middle": "0_1_5_5_5_5_5_5_5",
        "sandwich_bottom": "0_1_1_1_1_1_1_1_8",
        "sandwich_top": "0_7_7_7_7_7_7_7_8",
        "sandwich_middle": "0_4_4_4_4_4_4_4_8",
        "lasagna_bottom": "0_0_0_3_3_3_6_6_6",
        "lasagna_top": "2_2_2_5_5_5_8_8_8",
        "lasagna_middle": "1_1_1_4_4_4_7_7_7",
    },
    (12, 6): {
        "pizza_bottom": "0_1_2_3_4_5_5_5_5_5_5_5",
        "pizza_top": "0_1_2_3_4_11_11_11_11_11_11_11",
        "pizza_middle": "0_1_2_3_4_8_8_8_8_8_8_8",
        "sandwich_bottom": "0_1_2_3_3_3_3_3_3_3_10_11",
        "sandwich_top": "0_1_2_9_9_9_9_9_9_9_10_11",
        "sandwich_middle": "0_1_2_6_6_6_6_6_6_6_10_11",
        "lasagna_bottom": "0_0_2_2_4_4_6_6_8_8_10_10",
        "lasagna_top": "1_1_3_3_5_5_7_7_9_9_11_11",
        "lasagna_middle": "0_0_2_2_4_4_6_6_8_8_10_10",
    },
    (22, 11): {
        "pizza_bottom": "_".join(map(str, [*range(10), *[10] * 12])),
        "pizza_top": "_".join(map(str, [*range(10), *[21] * 12])),
        "pizza_middle": "_".join(map(str, [*range(10), *[15] * 12])),
        "sandwich_top": "_".join(map(str, [*range(5), *[16] * 12, *range(17, 22)])),
        "sandwich_middle": "_".join(map(str, [*range(5), *[10] * 12, *range(17, 22)])),
        "lasagna_bottom": "_".join(f"{i}_{i}" for i in range(0, 22, 2)),
    },
    (22, 3): {
        "sandwich_top": "_".join(map(str, [0, *[20] * 20, 21])),
        "sandwich_middle": "_".join(map(str, [0, *[10] * 20, 21])),
    },
}


@pytest.mark.parametrize(
    ("layers", "kv_layers", "layout", "expected"),
    [(*sizes, name, text) for sizes, found in EXAMPLES.items() for name, text in found.items()],
)
def test_the_papers_examples(layers: int, kv_layers: int, layout: Layout, expected: str) -> None:
    assert write_layer_types(kv_map(layout, layers, kv_layers)) == expected


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Any number of layers, and of KV layers among them."""
    layers = draw(st.integers(1, 64))
    return layers, draw(st.integers(1, layers))


@given(sizes(), st.sampled_from(LAYOUTS))
def test_what_holds_for_any_layout(size: tuple[int, int], layout: Layout) -> None:
    layers, kv_layers = size
    kv_of = kv_map(layout, layers, kv_layers)
    assert len(kv_of) == layers
    assert len(set(kv_of)) == kv_layers
    assert all(0 <= kv < layers for kv in kv_of)
    assert all(kv_of[kv] == kv for kv in kv_of), "a layer that is read reads itself"
    assert list(kv_of) == sorted(kv_of), "what shares lies side by side"
    if layout.endswith("_bottom"):
        assert all(kv <= i for i, kv in enumerate(kv_of)), "nothing is read from above"
    if layout.endswith("_top"):
        assert all(kv >= i for i, kv in enumerate(kv_of))


@given(sizes())
def test_a_ragged_lasagna_has_cores_as_equal_as_can_be(size: tuple[int, int]) -> None:
    layers, kv_layers = size
    kv_of = kv_map("lasagna_top", layers, kv_layers)
    found = {kv_of.count(kv) for kv in set(kv_of)}
    assert found <= {layers // kv_layers, -(-layers // kv_layers)}


def test_a_ragged_lasagna_is_cut_as_documented() -> None:
    """Boundaries at floor(j L / l): 22 layers into 3 are 0, 7, 14."""
    assert sorted(set(kv_map("lasagna_bottom", 22, 3))) == [0, 7, 14]
    assert kv_map("lasagna_middle", 5, 2) == (0, 0, 3, 3, 3)


@given(sizes())
def test_every_layer_its_own_at_the_limit(size: tuple[int, int]) -> None:
    layers, _ = size
    for layout in LAYOUTS:
        assert kv_map(layout, layers, layers) == tuple(range(layers))


@given(sizes())
def test_lckv_is_the_top_sandwich(size: tuple[int, int]) -> None:
    layers, kv_layers = size
    assert lckv_map(layers, kv_layers - 1) == kv_map("sandwich_top", layers, kv_layers)


@given(sizes())
def test_cla_is_the_bottom_lasagna_where_that_is_even(size: tuple[int, int]) -> None:
    layers, group = size
    kv_of = cla_map(layers, group)
    assert len(set(kv_of)) == -(-layers // group)
    if layers % group == 0:
        assert kv_of == kv_map("lasagna_bottom", layers, layers // group)


def test_cla_with_ordinary_layers_below() -> None:
    assert cla_map(10, 3, leading=1) == (0, 1, 1, 1, 4, 4, 4, 7, 7, 7)
    assert cla_map(7, 3, leading=2) == (0, 1, 2, 2, 2, 5, 5)


def test_yoco_shares_one_layer_above_the_lower_half() -> None:
    assert yoco_map(22) == (*range(12), *[11] * 10)
    assert yoco_map(6, kv_layers=2) == (0, 1, 1, 1, 1, 1)
    assert yoco_map(1) == (0,)


@given(sizes(), st.sampled_from(LAYOUTS))
def test_keeping_the_first_layer_changes_no_other(size: tuple[int, int], layout: Layout) -> None:
    kv_of = kv_map(layout, *size)
    kept = keep_first(kv_of)
    assert kept[0] == 0
    assert kept[1:] == kv_of[1:]


@given(sizes(), st.sampled_from(LAYOUTS))
def test_which_layouts_can_be_left_early(size: tuple[int, int], layout: Layout) -> None:
    """All but those whose topmost KV layer is read from below."""
    kv_of = kv_map(layout, *size)
    layers = len(kv_of)
    sizes_of = DecoderConfig(vocab_size=2, **llama(8, layers, 1, 1, 8))
    config = sizes_of.with_(sharing=Sharing(kv_of))
    top = max(kv_of)
    upward = any(kv == top and i < top for i, kv in enumerate(kv_of))
    assert exit_layer(config) == (None if upward else top)
    cyclic = sum(part.stop - part.start for part in segments(config) if part.cyclic)
    assert (cyclic > 0) == any(kv > i for i, kv in enumerate(kv_of))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: kv_map("pizza_top", 4, 5), "kv_layers: must be from 1 to the decoder's 4 layers"),
        (lambda: kv_map("pizza_top", 4, 0), "kv_layers: .* found 0"),
        (lambda: lckv_map(4, 4), "warmup_layers: must be below the decoder's 4 layers, found 4"),
        (lambda: lckv_map(4, -1), "warmup_layers: .* found -1"),
        (lambda: cla_map(4, 5), "group: must be at most the decoder's 4 layers .* found 5"),
        (lambda: cla_map(4, 2, 4), "leading: must be below the decoder's 4 layers, found 4"),
        (lambda: cla_map(4, 3, 2), "group: must be at most the decoder's 2 layers from layer 2 on"),
        (lambda: yoco_map(4, 5), "kv_layers: .* found 5"),
    ],
)
def test_what_no_decoder_has(make: Any, error: str) -> None:
    with pytest.raises(MethodError, match=error):
        make()
