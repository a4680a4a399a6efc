"""Methods in words."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab.methods.registry import resolve
from kvlab.platform.compare.labels import method_text, varying_parameters, with_its_budget


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


def test_a_default_budget_is_named_where_it_varies_and_is_read() -> None:
    written: list[Any] = [
        {},
        {"int8": {}},
        {"sliding_window": {"window": 64}},
        {"h2o": {}},
        {"h2o": {}, "uniform": {"share": 0.5}},
    ]
    methods = [with_its_budget(resolve(one).to_dict()) for one in written]
    assert [method_text(one, varying_parameters(methods)) for one in methods] == [
        "",
        "int8",
        "sliding_window(window=64)",
        "uniform(share=0.2) + h2o",
        "uniform(share=0.5) + h2o",
    ]
    assert method_text(methods[3]) == "h2o"
    unknown = {"eviction": {"of_another_version": {"rows": 3}}}
    assert method_text(with_its_budget(unknown)) == "of_another_version(rows=3)"
