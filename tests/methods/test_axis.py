"""Methods by name, their canonical form, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kvlab.methods.axis import AXES, MethodError, Value
from kvlab.methods.registry import REGISTRY, from_dict, resolve

WRITTEN: list[Any] = [
    "full_attention",
    {},
    {"sliding_window": None},
    {"sliding_window": {"window": 64}},
    {"block_transformer": {"block_length": 2}},
    {"block_transformer": {"block_length": 2}, "sliding_window": {"window": 8}},
    {"block_transformer": {"block_length": 2}, "yoco": {}, "prefill": {"passes": 2}},
]


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_the_canonical_form_is_read_back(written: Any) -> None:
    method = resolve(written)
    again = from_dict(method.to_dict())
    assert again.choices == method.choices
    assert again.to_dict() == method.to_dict()


def test_defaults_leave_no_trace() -> None:
    assert resolve("full_attention").to_dict() == {} == resolve({"token": {}}).to_dict()
    assert from_dict({}).label == "full_attention"


def test_every_default_of_a_value_is_allowed() -> None:
    for value in REGISTRY.values():
        assert value.axis in AXES
        reader = {"h2o": {}} if value.axis == "budget" else {}
        assert resolve({value.name: {}, **reader})[value.axis].params == value.params()


@pytest.mark.parametrize(
    ("canonical", "error"),
    [
        ({"eviction": {"token": {}}}, "'token' is not a value of the eviction axis"),
        ({"eviction": {"sliding_windw": {}}}, "did you mean 'sliding_window'"),
        ({"granularity": {"block_transformer": {"block_length": 0}}}, "int from 1 to 64, found 0"),
        ({"granularity": {"block_transformer": {"embedder": "x"}}}, "must be one of auto, lookup"),
        ({"granularity": {"block_transformer": {"ratio": "1"}}}, "float from"),
        ({"granularity": {"block_transformer": {"random_padding": 1}}}, "must be bool, found 1"),
        ({"granularity": {"block_transformer": {"block_layers": "a"}}}, "or null, found 'a'"),
        ({"sharing": {"cross_layer": {"layers": 3}}}, "must be str or a list or null, found 3"),
        ({"sharing": {"cross_layer": {"layers": [0, "1"]}}}, "or a list of int or null"),
    ],
)
def test_what_is_refused(canonical: Any, error: str) -> None:
    with pytest.raises(MethodError, match=error):
        from_dict(canonical)


def test_implementations_and_costs_are_there() -> None:
    import importlib

    for value in REGISTRY.values():
        if value.axis not in ("sharing", "prefill"):
            assert callable(value.load())
            assert value.cost is not None
            importlib.import_module(value.cost)


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ({"h2o": 0.2}, "h2o: must be a mapping of parameters, found 0.2"),
        ({"snapkv": ["window"]}, r"snapkv: must be a mapping of parameters, found \['window'\]"),
        ({5: {}}, "unknown method '5'"),
        (["h2o"], r"a method is a name, or names with parameters, found \['h2o'\]"),
        (None, "a method is a name"),
    ],
)
def test_what_is_no_method_at_all(written: Any, error: str) -> None:
    with pytest.raises(MethodError, match=error) as raised:
        resolve(written)
    assert "\n" not in str(raised.value)


def test_two_values_of_one_axis() -> None:
    with pytest.raises(MethodError, match="both choose the eviction axis"):
        resolve({"sliding_window": {}, "full_attention": {}})


def test_a_name_is_taken_once() -> None:
    entry = REGISTRY.find("token")
    assert isinstance(entry, Value)
    with pytest.raises(MethodError, match="'token' is taken"):
        REGISTRY.add(entry)


def test_names_params_and_costs_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kvlab.methods.registry import resolve\n"
        "from kvlab.methods.cost import cost_of\n"
        "from kvlab.methods.decoder.config import PRESETS, DecoderConfig\n"
        "config = DecoderConfig(vocab_size=2048, **PRESETS['nano'])\n"
        "print(cost_of(config, resolve('full_attention')).total_parameters())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
