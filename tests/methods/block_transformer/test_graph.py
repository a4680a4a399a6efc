"""A block's whole step under one graph: what replays say, and what they leave.

What captures is an emulation of the memory of CUDA graphs: see `methods/conformance/graph.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.decoder import graph
from kvlab.methods.decoder.generation import generate, left_pad
from kvlab.methods.decoder.graph import Greedy
from kvlab.methods.model import Session
from kvlab.methods.registry import resolve

Make = Callable[..., BlockTransformer]
DECODERS = ["prefix", "summation", "cross_attention"]
KINDS = [
    *({"token_decoder": decoder, "expansion": "linear"} for decoder in DECODERS),
    *({"token_decoder": decoder, "expansion": "repeat"} for decoder in DECODERS),
]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": {"window": 3}},
    "streaming": {"streaming_llm": {"sinks": 1}, "uniform": {"tokens": 4}},
    "h2o": {"h2o": {}, "uniform": {"tokens": 4}},
    "int8": {"int8": {}},
}
NEW = 43
LENGTH = 4


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LEAST", 2)


def prompts(ids: Callable[..., Tensor], lengths: list[int]) -> list[list[int]]:
    return [ids(length).tolist() for length in lengths]


def started(model: BlockTransformer, texts: list[list[int]], written: Any, new: int) -> Session:
    rows, valid = left_pad(texts, torch.device("cpu"))
    return model.start(rows, valid, new_tokens=new, apply=resolve(written))


def take(greedy: Greedy, count: int) -> Tensor:
    parts: list[Tensor] = []
    while (rows := sum(map(len, parts))) < count:
        parts.append(greedy.more(count - rows))
    return torch.cat(parts)


def until_refused(greedy: Greedy) -> Tensor:
    parts: list[Tensor] = []

    def forever() -> None:
        while True:
            parts.append(greedy.more(100))

    with pytest.raises(KvlabError, match="opened for"):
        forever()
    return torch.cat(parts)


def alike(ours: Session, theirs: Session) -> None:
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-6)
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert ours.kv_tokens() == theirs.kv_tokens()


def go_through(model: BlockTransformer, texts: list[list[int]], written: Any, capture: Any) -> int:
    """Hold replays to eager steps: in a generation, and in what comes after it."""
    ours, theirs = (started(model, texts, written, 3 * NEW) for _ in range(2))
    replaying, eager = Greedy(ours, capture), Greedy(theirs, None)
    for count in (NEW, NEW - 2):  # the second part begins within a block
        assert torch.equal(take(replaying, count), take(eager, count))
        alike(ours, theirs)
    replayed = replaying.replayed
    assert replayed % LENGTH == 0
    turn = torch.arange(3 * len(texts)).view(len(texts), 3) + 1
    ours.extend(turn)
    theirs.extend(turn)
    alike(ours, theirs)
    assert torch.equal(take(replaying, 22), take(eager, 22))
    alike(ours, theirs)
    assert (replaying.replayed > replayed) == (replayed > 0)
    return replayed


@pytest.mark.parametrize("lengths", [[16, 16], [5, 19, 8]], ids=["equal", "padded"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_a_replayed_block_is_an_eager_one(
    make: Make, ids: Callable[..., Tensor], emulated: Any, kind: dict[str, str], lengths: list[int]
) -> None:
    model = make(block_length=LENGTH, **kind).double()
    assert go_through(model, prompts(ids, lengths), {}, emulated) >= 60


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("decoder", DECODERS)
def test_an_eviction_of_blocks_is_in_it(
    make: Make, ids: Callable[..., Tensor], emulated: Any, decoder: str, name: str
) -> None:
    model = make(block_length=LENGTH, token_decoder=decoder).double()
    for lengths in ([24, 24], [24, 3]):
        assert go_through(model, prompts(ids, lengths), METHODS[name], emulated) >= 52


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_no_block_beyond_what_was_opened(
    make: Make, ids: Callable[..., Tensor], emulated: Any, name: str
) -> None:
    """Tokens are handed out up to the one whose block has no room, as eager steps do."""
    model = make(block_length=LENGTH)
    texts = prompts(ids, [24, 24])
    for room in (24, 25, 27):
        found = []
        for capture in (emulated, None):
            session = started(model, texts, METHODS[name], room)
            greedy = Greedy(session, capture)
            tokens = until_refused(greedy)
            found.append((tokens, session.kv_tokens(), greedy.replayed))
        (ours, held, replayed), (theirs, their_held, _) = found
        assert torch.equal(ours, theirs)
        assert held == their_held
        assert replayed >= 12


@pytest.mark.parametrize("most", [0, 1, 30, 150, 400])
def test_a_capture_that_fails_leaves_nothing_behind(
    make: Make, ids: Callable[..., Tensor], emulated: Any, most: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    graph._say.cache_clear()
    for decoder in DECODERS:
        model = make(block_length=LENGTH, token_decoder=decoder).double()
        with caplog.at_level(logging.WARNING):
            replayed = go_through(model, prompts(ids, [5, 19]), {}, partial(emulated, most=most))
        assert replayed == 0
    assert "one call too many" in caplog.text


def test_generation_captures_blocks(make: Make, ids: Callable[..., Tensor], emulated: Any) -> None:
    model = make(block_length=LENGTH)
    texts = prompts(ids, [5, 19, 8])
    captured: list[Any] = []

    def capture(action: Callable[[], object]) -> Any:
        captured.append(emulated(action))
        return captured[-1]

    assert generate(model, texts, 30, capture=lambda device: capture) == generate(model, texts, 30)
    assert len(captured) == 1
