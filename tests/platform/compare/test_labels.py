"""Methods in words."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab.methods.registry import resolve
from kvlab.platform.compare.labels import method_text, varying_parameters


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("full_attention", ""),
        ("cross_layer", "cross_layer"),
        ({"cross_layer": {"layout": "sandwich_top"}}, "cross_layer(layout=sandwich_top)"),
        # Without a layout, which is what a map is: no `layout=null`.
        ({"cross_layer": {"layers": [0, 0]}}, "cross_layer(layers=0_0)"),
        ({"block_transformer": {}, "cla": {"group": 3}}, "block_transformer + cla(group=3)"),
        ({"prefill": {"early_exit": False}}, "prefill(early_exit=false)"),
    ],
    ids=str,
)
def test_a_method_in_words(written: Any, text: str) -> None:
    assert method_text(resolve(written).to_dict()) == text


def test_what_varies_is_named_even_where_it_is_the_default() -> None:
    method = resolve("cross_layer").to_dict()
    shown = method_text(method, [("cross_layer", "layout")])
    assert shown == "cross_layer(layout=pizza_bottom)"


def test_a_parameter_varies_among_equal_choices_alone() -> None:
    written = [{"lckv": {"strict": True}}, {"cla": {}}, {"cla": {"group": 3}}]
    methods = [resolve(one).to_dict() for one in written]
    assert varying_parameters(methods) == {("cla", "group")}
