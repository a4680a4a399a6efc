"""What a cache refuses to take over, and where what it takes over lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.conformance.cases import Case, texts
from kvlab.methods.conformance.device import NOWHERE, Away, Device, send
from kvlab.methods.conformance.run import Run
from kvlab.methods.registry import resolve

H2O = {"h2o": {}, "uniform": {"tokens": 8}}


@pytest.mark.parametrize(
    ("other", "decoder", "batch"),
    [
        (H2O, "gqa", 3),
        (H2O, "mha", 1),
        (H2O, "windows", 1),
        ({"streaming_llm": {}, "uniform": {"tokens": 8}}, "gqa", 1),
        ({**H2O, "int8": {}}, "gqa", 1),
        ({}, "gqa", 1),
    ],
)
def test_the_state_of_another_cache_is_refused(
    other: dict[str, Any], decoder: str, batch: int
) -> None:
    """Of one sequence too, which would fit any number of them."""
    case = Case(resolve(H2O), "gqa")
    run = Run(case.model(), case.method, 1, 24)
    run.read(texts(1, 16))
    cache = open_cache(
        Case(resolve(other), decoder).config, resolve(other), batch=batch, tokens=24,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    with pytest.raises(KvlabError, match="not of this shape") as raised:
        cache.restore(run.cache.state())
    assert "\n" not in str(raised.value)
    if not other:
        with pytest.raises(KvlabError, match="not of this shape"):
            run.cache.restore(cache.state())


@pytest.mark.parametrize(
    "written",
    [
        {"streaming_llm": {"turns": True}, "uniform": {"tokens": 8}},
        {"h2o": {}, "squeeze_attention": {"refresh": 3}},
    ],
)
def test_a_state_from_the_host_goes_on_elsewhere(written: dict[str, Any]) -> None:
    """As it is read from a file: before a turn, and in the middle of what a budget measures."""
    case = Case(resolve(written), "gqa")
    here = Run(case.model(), case.method, 2, 40)
    here.read(texts(2, 16))
    here.steps(texts(2, 2))
    with torch.no_grad(), Device():
        there = Run(send(case.model()), case.method, 2, 40, device=NOWHERE)
        there.cache.restore({name: t.clone() for name, t in here.cache.state().items()})
        for name, tensor in there.cache.state().items():
            if name == "newest" or name in ("importance.0", "importance.1"):
                assert tensor.device == NOWHERE
        assert here.next is not None
        there.next = Away(here.next)
        turn = there.read(Away(texts(2, 4, 1)), new_tokens=2).cpu()
    torch.testing.assert_close(turn, here.read(texts(2, 4, 1), new_tokens=2))
