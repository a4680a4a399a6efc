"""Maps as text, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.methods.axis import MethodError
from kvlab.methods.sharing.layer_types import LayerTypes, read_layer_types, write_layer_types


def test_an_s_is_a_window() -> None:
    assert read_layer_types("0s_1_1s") == LayerTypes((0, 1, 1), (True, False, True))


@given(st.lists(st.tuples(st.integers(0, 9999), st.booleans()), min_size=1))
def test_what_is_written_is_read_back(entries: list[tuple[int, bool]]) -> None:
    kv_of, windowed = (tuple(column) for column in zip(*entries, strict=True))
    text = write_layer_types(kv_of, windowed)
    assert read_layer_types(text) == (kv_of, windowed)
    assert write_layer_types(*read_layer_types(text)) == text


def test_without_windows() -> None:
    assert write_layer_types((0, 0, 2)) == "0_0_2"
    assert read_layer_types("00_01") == LayerTypes((0, 1), (False, False))


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("", "entry 0 is ''"),
        ("0__1", "entry 1 is ''"),
        ("0_1_", "entry 2 is ''"),
        ("0_-1", "entry 1 is '-1'"),
        ("0_1S", "entry 1 is '1S'"),
        ("0_1ss", "entry 1 is '1ss'"),
        ("0, 1", "entry 0 is '0, 1'"),
        ("0_1\n", r"entry 1 is '1\\n'"),
        ("0_\u0661", "entry 1 is"),
        ("0_10000", "entry 1 is '10000'"),
        ("x" * 5000, f"entry 0 is '{'x' * 20}'"),
    ],
)
def test_what_is_no_entry(text: str, entry: str) -> None:
    with pytest.raises(MethodError, match=f"layers: {entry}.*must be the number of a layer"):
        read_layer_types(text)
