"""A captured step, replayed, says what an eager one says, and leaves what it leaves.

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.methods.build import build
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.slots import SlotCache
from kvlab.methods.decoder import graph
from kvlab.methods.decoder.config import DecoderConfig, Sharing, llama
from kvlab.methods.decoder.generation import generate, left_pad
from kvlab.methods.decoder.graph import Greedy
from kvlab.methods.model import LanguageModel, Session
from kvlab.methods.registry import resolve

CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": llama(32, 2, 4, 2, 48, qk_norm=True),
    "windows": llama(32, 3, 4, 4, 48, windows=(9, None, 9)),
    "shared": llama(32, 3, 4, 2, 48, sharing=Sharing((0, 1, 1))),
    "strict": llama(32, 3, 4, 2, 48, sharing=Sharing((0, 1, 1), strict=True)),
    "upward": llama(32, 3, 4, 2, 48, sharing=Sharing((0, 2, 2))),
}
TOKENS = {"tokens": 10}
CUT: dict[str, Any] = {"uniform": TOKENS}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": {"window": 7}},
    "newest": {"sliding_window": {}, **CUT},
    "streaming": {"streaming_llm": {"positions": "absolute"}, **CUT},
    "in cache": {"streaming_llm": {"positions": "cache"}, **CUT},
    "by turn": {"streaming_llm": {"turns": True}, "uniform": {"tokens": 28}},
    "h2o": {"h2o": {}, **CUT},
    "rolling h2o": {"h2o": {"positions": "cache"}, **CUT},
    "h2o that fills late": {"h2o": {}, "uniform": {"tokens": 52}},
    "roomy h2o": {"h2o": {}, "uniform": {"tokens": 400}},
    "snapkv": {"snapkv": {"window": 4}, **CUT},
    "snapkv by query": {"snapkv": {"window": 4, "heads": "query"}, **CUT},
    "h2o that grows": {"h2o": {"generated": "keep"}, **CUT},
    "squeeze": {"sliding_window": {}, "squeeze_attention": {"tokens": 12}},
    "squeeze h2o": {"h2o": {}, "squeeze_attention": {"share": 0.5}},
    "int8": {"int8": {}},
    "fp8": {"fp8": {}},
    "int8 window": {"sliding_window": {"window": 7}, "int8": {}},
    "fp8 h2o": {"h2o": {}, **CUT, "fp8": {}},
}
NEW = 26
UNEQUAL = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4], [2, 7, 1, 8, 2, 8, 1, 8]]
EQUAL = [prompt * 3 for prompt in ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9])]
TURN = torch.tensor([[7, 2, 9], [1, 1, 30], [12, 8, 4]])


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture also where hardly anything is left to replay."""
    monkeypatch.setattr(graph, "LEAST", 2)


def made(name: str) -> LanguageModel:
    torch.manual_seed(0)
    model = build(DecoderConfig(53, **CONFIGS[name]), resolve({})).eval()
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.25)
    return model.double()


def started(model: LanguageModel, prompts: list[list[int]], written: Any, new: int) -> Session:
    return model.start(
        *left_pad(prompts, torch.device("cpu")), new_tokens=new, apply=resolve(written)
    )


def take(greedy: Greedy, count: int) -> Tensor:
    parts: list[Tensor] = []
    while (rows := sum(map(len, parts))) < count:
        parts.append(greedy.more(count - rows))
    return torch.cat(parts)


def alike(ours: Session, theirs: Session) -> None:
    """Two sessions say the same, and hold the same."""
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-6)
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert ours.kv_tokens() == theirs.kv_tokens()


def go_through(
    model: LanguageModel, prompts: list[list[int]], written: Any, capture: Any, **turn: int
) -> int:
    """Hold replays to eager steps: in a generation, and in what comes after it."""
    length = len(prompts)
    room = 2 * NEW + 3 + TURN.shape[1]
    ours, theirs = (started(model, prompts, written, room) for _ in range(2))
    replaying, eager = Greedy(ours, capture), Greedy(theirs, None)
    assert torch.equal(take(replaying, NEW), take(eager, NEW))
    alike(ours, theirs)
    replayed = replaying.replayed
    for tokens in TURN.T[:, :length].unbind(0)[:2]:  # somebody else goes on
        ours.step(tokens)
        theirs.step(tokens)
        alike(ours, theirs)
    ours.extend(TURN[:length], **turn)
    theirs.extend(TURN[:length], **turn)
    alike(ours, theirs)
    assert torch.equal(take(replaying, NEW), take(eager, NEW))
    alike(ours, theirs)
    assert (replaying.replayed > replayed) == (replayed > 0)
    assert eager.replayed == 0
    return replayed


@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL], ids=["equal", "padded"])
@pytest.mark.parametrize("name", list(METHODS))
def test_replays_are_eager_steps(emulated: Any, name: str, prompts: list[list[int]]) -> None:
    turn = {"new_tokens": NEW} if name == "by turn" else {}
    assert go_through(made("grouped"), prompts, METHODS[name], emulated, **turn) == NEW - 2


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "grouped"])
@pytest.mark.parametrize("name", ["full", "window", "streaming", "in cache", "h2o", "int8"])
def test_whatever_layers_read(emulated: Any, name: str, config: str) -> None:
    for prompts in (EQUAL, EQUAL[:1]) if config == "windows" else (EQUAL, UNEQUAL):
        assert go_through(made(config), prompts, METHODS[name], emulated) >= NEW - 3


class Launched(TorchDispatchMode):
    """Notes the operations of steps and the sizes of what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        given = tree_leaves((args, kwargs))
        self.calls.append((str(func), [x.shape for x in given if isinstance(x, Tensor)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("name", list(METHODS))
def test_frozen_steps_are_the_same_work(name: str, config: str) -> None:
    """What is captured was launched before, so nothing is compiled within; however full it is."""
    for length in (8, 9, 10, 11):  # two slots are left, one, none; of a budget of 10
        prompts = [[(3 * i + length) % 53 for i in range(length - short)] for short in (0, 1)]
        for rows in (prompts, prompts[:1]):
            session = started(made(config), rows, METHODS[name], NEW)
            assert session.freeze()
            steps = []
            for _ in range(4):
                with torch.inference_mode(), Launched() as launched:
                    session.step(session.logits.argmax(-1))
                steps.append(launched.calls)
            assert all(step == steps[0] for step in steps)


@pytest.mark.parametrize("lengths", [(14, 16), (15, 16), (16, 16)])
def test_slots_that_nobody_may_take_are_never_read(lengths: tuple[int, int]) -> None:
    """Budgets differ from sample to sample: the smaller one's last slots stay empty."""
    written = {"h2o": {}, "squeeze_attention": {"share": 0.5}}
    prompts = [[(5 * i + n) % 53 for i in range(n)] for n in lengths]
    ours, theirs = (started(made("grouped"), prompts, written, NEW) for _ in range(2))
    for _ in range(NEW):
        assert ours.freeze()
        tokens = theirs.logits.argmax(-1)
        ours.step(tokens)
        theirs.step(tokens)
        alike(ours, theirs)


@pytest.mark.parametrize(
    "written",
    [
        {"kivi": {"bits": 4, "residual": 8, "group": 8}},
        {"h2o": {}, "squeeze_attention": {"tokens": 12, "refresh": 5}},
        {"adore": {"scores": "rule", "recent": 2, "rebuild": 3, "refresh": 3}, **CUT},
    ],
    ids=str,
)
def test_what_the_host_decides_stays_eager(emulated: Any, written: dict[str, Any]) -> None:
    assert go_through(made("grouped"), EQUAL, written, emulated) == 0
    session = started(made("grouped"), EQUAL, written, NEW)
    for tokens in TURN.T:
        session.step(tokens)
        assert not session.freeze()


@pytest.mark.parametrize("name", ["full", "window", "h2o", "snapkv", "in cache"])
def test_no_row_beyond_what_was_opened(emulated: Any, name: str) -> None:
    for more in range(1, 3):
        session = started(made("grouped"), EQUAL, METHODS[name], NEW)
        greedy = Greedy(session, emulated)
        take(greedy, NEW + 1)
        assert greedy.replayed >= NEW - 3
        held = session.kv_tokens(), session.logits.clone()
        for _ in range(more):
            with pytest.raises(KvlabError, match=f"opened for {15 + NEW} positions and is asked"):
                greedy.more(50)
            with pytest.raises(KvlabError, match="opened for"):
                session.step(TURN[:, 0])
            with pytest.raises(KvlabError, match="opened for"):
                session.advance()
        assert session.kv_tokens() == held[0]
        assert torch.equal(session.logits, held[1])


def test_what_is_not_frozen_hears_of_no_replay() -> None:
    for name in ("full", "h2o"):
        session = started(made("grouped"), EQUAL, METHODS[name], NEW)
        with pytest.raises(KvlabError, match="not frozen"):
            session.advance()


@pytest.mark.parametrize("name", ["full", "h2o", "snapkv", "squeeze", "int8"])
@pytest.mark.parametrize("most", [0, 1, 20, 90])
def test_a_capture_that_fails_leaves_nothing_behind(
    emulated: Any, name: str, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    graph._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        replayed = go_through(made("grouped"), UNEQUAL, METHODS[name], partial(emulated, most=most))
    assert replayed == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "one call too many" in caplog.text
    session = started(made("grouped"), EQUAL, METHODS[name], NEW)
    take(Greedy(session, partial(emulated, most=most)), 5)
    with pytest.raises(KvlabError, match="not frozen"):  # steps read what is in use alone, again
        session.advance()


@pytest.mark.parametrize("name", ["full", "window", "h2o", "snapkv"])
def test_a_frozen_session_that_is_thawed_is_as_before(name: str) -> None:
    ours, theirs = (started(made("grouped"), EQUAL, METHODS[name], NEW) for _ in range(2))
    for step in range(NEW):
        tokens = ours.logits.argmax(-1)
        if step % 6 == 1:
            assert ours.freeze()
            assert ours.freeze()
        if step % 6 == 4:
            ours.thaw()
        ours.step(tokens)
        theirs.step(tokens)
        alike(ours, theirs)
    held = [getattr(session, "_cache") for session in (ours, theirs)]  # noqa: B009
    if isinstance(held[0], EvictingCache):
        assert [(t.low, t.high) for t in held[0]._tables] == [
            (t.low, t.high) for t in held[1]._tables
        ]
        for one, other in zip(held[0]._tables, held[1]._tables, strict=True):
            assert torch.equal(one.positions, other.positions)
    else:
        assert isinstance(held[0], SlotCache)
        for one, other in zip(held[0]._tables.values(), held[1]._tables.values(), strict=True):
            assert torch.equal(one.positions, other.positions)
            assert (one.positions != EMPTY).any()


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_a_session_that_others_thaw_is_captured_anew(emulated: Any, name: str) -> None:
    ours, theirs = (started(made("grouped"), EQUAL, METHODS[name], NEW) for _ in range(2))
    replaying, eager = Greedy(ours, emulated), Greedy(theirs, None)
    assert torch.equal(take(replaying, 12), take(eager, 12))
    replayed = replaying.replayed
    ours.thaw()
    assert torch.equal(take(replaying, 12), take(eager, 12))
    alike(ours, theirs)
    assert replaying.replayed > replayed > 0


def test_a_cache_that_was_saved_goes_on(emulated: Any) -> None:
    """What a replay leaves in a cache is what another one can go on from."""
    for name in ("full", "h2o", "snapkv"):
        model = made("grouped")
        ours, theirs = (started(model, EQUAL, METHODS[name], NEW) for _ in range(2))
        take(Greedy(ours, emulated), NEW - 3)
        take(Greedy(theirs, None), NEW - 3)
        found, wanted = ours._cache.state(), theirs._cache.state()  # type: ignore[attr-defined]
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


def test_tokens_that_were_handed_out_stay(emulated: Any) -> None:
    session = started(made("grouped"), EQUAL, {}, NEW)
    greedy = Greedy(session, emulated)
    parts = []
    for _ in range(NEW):
        part = greedy.more(NEW)
        parts.append((part, part.clone()))
    assert all(torch.equal(part, then) for part, then in parts)
    assert len({tuple(part.flatten().tolist()) for part, _ in parts}) > 3


def test_little_is_not_captured(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LEAST", 8)
    for count, replayed in ((8, 0), (9, 7)):
        greedy = Greedy(started(made("grouped"), EQUAL, {}, count), emulated)
        take(greedy, count)
        assert greedy.replayed == replayed


def test_generation_captures_where_it_is_greedy(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("grouped")
    captured: list[object] = []

    def capture(action: Callable[[], object]) -> Any:
        captured.append(emulated(action))
        return captured[-1]

    for apply in ({}, METHODS["h2o"]):
        method = resolve(apply)
        whole = generate(model, UNEQUAL, 40, apply=method)
        assert generate(model, UNEQUAL, 40, apply=method, capture=lambda device: capture) == whole
        eos = whole[0][5]
        ends = {"eos": eos, "apply": method}
        ended = generate(model, UNEQUAL, 40, capture=lambda device: capture, **ends)
        assert ended == generate(model, UNEQUAL, 40, **ends)
    assert len(captured) == 4
    generate(model, UNEQUAL, 40, temperature=1.0, capture=lambda device: capture)
    assert len(captured) == 4
