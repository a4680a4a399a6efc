"""Every method that kvlab ships is held to the suite; a new one by being registered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvlab.methods.axis import AxisName
from kvlab.methods.catalog import ENTRIES
from kvlab.methods.conformance.cases import DECODERS, Case, UnfitError
from kvlab.methods.conformance.properties import PROPERTIES
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import resolve

SMALL: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 10},
    "snapkv": {"window": 4},
    "kivi": {"group": 8, "residual": 8},
    "adore": {"scores": "rule"},
}
"""Parameters at which a short text already shows what a method does."""
MORE: list[dict[str, Any]] = [
    {"sliding_window": {}},
    {"sliding_window": {}, "squeeze_attention": {}},
    {"sliding_window": {"window": 10}, "kivi": {"group": 8, "residual": 8}},
    {"streaming_llm": {"positions": "absolute"}},
    {"streaming_llm": {"turns": True}},
    {"streaming_llm": {"generated": "keep"}, "int8": {}},
    {"h2o": {"positions": "cache"}},
    {"h2o": {"generated": "keep"}},
    {"snapkv": {"window": 4, "heads": "query", "pooling": "max"}},
    {"h2o": {}, "squeeze_attention": {"refresh": 3}},
    {"h2o": {}, "kivi": {"bits": 2, "group": 8, "residual": 16}},
    {"h2o": {}, "squeeze_attention": {}, "kivi": {"group": 8, "residual": 8}},
    {"snapkv": {"window": 4}, "pyramidkv": {}, "int8": {}},
    {"adore": {"scores": "rule", "readmit": True}, "squeeze_attention": {}, "int8": {}},
    {"adore": {"scores": "rule", "every": 2, "refresh": 3}, "kivi": {"group": 8, "residual": 8}},
    {"streaming_llm": {}, "squeeze_attention": {"importance": "mass"}, "fp8": {}},
]
"""What defaults alone do not reach, and some of three axes."""


def names(axis: AxisName, *, default: bool) -> list[str]:
    """Values of an axis that this repository registers."""
    return [
        entry.name for entry in ENTRIES
        if getattr(entry, "axis", None) == axis and (default or not getattr(entry, "default", True))
    ]  # fmt: skip


def written(name: str, config: DecoderConfig) -> dict[str, Any]:
    if name == "per_layer":
        return {"shares": [0.5, 0.3, 0.4][: len(config.kv_layers)]}
    return SMALL.get(name, {})


def chosen() -> Iterator[tuple[str, list[str]]]:
    """Decoder, and the values of a method on it: alone on each, composed on two."""
    for eviction in names("eviction", default=True):
        yield from ((decoder, [eviction]) for decoder in DECODERS)
    for decoder in ("gqa", "windows"):
        for eviction in ("h2o", "streaming_llm"):
            yield from ((decoder, [eviction, b]) for b in names("budget", default=False))
        for eviction in ("full_attention", "h2o"):
            yield from ((decoder, [eviction, p]) for p in names("precision", default=False))


def made() -> Iterator[Case]:
    for decoder, values in chosen():
        config = DecoderConfig(9, **DECODERS[decoder])
        if values == ["streaming_llm", "global_topk"]:
            continue  # it gives no scores that layers can compare
        yield Case(resolve({name: written(name, config) for name in values}), decoder)
    for decoder in ("gqa", "shared"):
        yield from (Case(resolve(values), decoder) for values in MORE)


CASES = list(made())
LABELS = [f"{case.name}-{i}" for i, case in enumerate(CASES)]
SLOW = {"operations", "no_waiting"}
"""Properties that depend little on the decoder: one will do."""


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_it_conforms(case: Case, name: str) -> None:
    if name in SLOW and case.decoder not in ("gqa", "shared"):
        pytest.skip("held on another decoder")
    try:
        case.check()
        PROPERTIES[name](case)
    except UnfitError as error:
        pytest.skip(str(error))
