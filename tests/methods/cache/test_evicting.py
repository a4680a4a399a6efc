"""One cache under every eviction, budget and precision: theorems over random compositions."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.axis import Method
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import Sharing
from kvlab.methods.decoder.generation import left_pad
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.model import Session
from kvlab.methods.registry import resolve

Make = Callable[..., TokenModel]
EXACT = {"rtol": 1e-4, "atol": 1e-6}  # the key mass is float32 even where the model is float64
quick = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
EVICTIONS: list[dict[str, Any]] = [
    {"sliding_window": {}},
    {"streaming_llm": {"sinks": 2}},
    {"streaming_llm": {"sinks": 1, "positions": "absolute"}},
    {"h2o": {"recent": 0.5}},
    {"h2o": {"recent": 0.0, "positions": "cache"}},
]
GROWING: list[dict[str, Any]] = [
    {"streaming_llm": {"sinks": 2, "generated": "keep"}},
    {"h2o": {"generated": "keep"}},
    {"snapkv": {"window": 3, "kernel": 3}},
    {"snapkv": {"window": 2, "kernel": 5, "pooling": "max", "heads": "query"}},
    {"observed_attention": {}},
]
PRECISIONS: list[dict[str, Any]] = [{}, {}, {"int8": {}}, {"kivi": {"group": 8, "residual": 8}}]
SCORED = ("h2o", "snapkv", "observed_attention")


@st.composite
def budgets(draw: st.DrawFn, eviction: str, most: int = 14) -> dict[str, Any]:
    kinds = ["uniform", "squeeze_attention", "squeeze_attention", "pyramidkv", "per_layer"]
    kinds += ["global_topk"] if eviction in SCORED else []
    kind = draw(st.sampled_from(kinds))
    tokens = draw(st.integers(5, most))
    if kind == "per_layer":
        return {kind: {"tokens": [tokens, draw(st.integers(5, most)), tokens]}}
    amount = draw(st.sampled_from([{"tokens": tokens}, {"share": 0.6}]))
    if kind == "squeeze_attention":
        amount |= draw(st.sampled_from([{}, {"importance": "mass"}, {"p": None}]))
    return {kind: amount}


@st.composite
def methods(draw: st.DrawFn, evictions: list[dict[str, Any]]) -> Method:
    """An eviction, a budget and a precision."""
    eviction = draw(st.sampled_from(evictions))
    budget = draw(budgets(next(iter(eviction))))
    return resolve({**eviction, **budget, **draw(st.sampled_from(PRECISIONS))})


texts = st.lists(
    st.lists(st.integers(0, 52), min_size=9, max_size=20), min_size=2, max_size=3
)  # fmt: skip


def walk(model: TokenModel, prompts: list[list[int]], method: Method, steps: int) -> Any:
    """Yield the session after the prompts, and after each of so many steps and a turn."""
    ids, valid = left_pad(prompts, torch.device("cpu"))
    session = model.start(ids, valid, new_tokens=steps + 4, apply=method)
    yield session
    for step in range(steps):
        session.step(torch.full((len(prompts),), 5 * step + 1))
        yield session
    session.extend(torch.tensor([[7, 30, 8]]).expand(len(prompts), -1), new_tokens=1)
    yield session
    session.step(torch.full((len(prompts),), 3))
    yield session


def rows(cache: EvictingCache, layer: int, sample: int) -> list[list[int]]:
    """The positions that each head holds."""
    heads: list[list[int]] = cache.held(layer)[sample].tolist()
    return [sorted(row for row in head if row != EMPTY) for head in heads]


@quick
@given(methods(EVICTIONS + GROWING), texts)
def test_a_batch_is_its_sequences_one_by_one(
    tiny: Make, method: Method, prompts: list[list[int]]
) -> None:
    model = tiny("llama", layers=3).double()
    alone = [walk(model, [prompt], method, 6) for prompt in prompts]
    for session in walk(model, prompts, method, 6):
        for sample, one in enumerate(alone):
            single = next(one)
            for layer in range(3):
                found = rows(session._cache, layer, sample)
                assert found == rows(single._cache, layer, 0)
            torch.testing.assert_close(session.logits[sample], single.logits[0], **EXACT)


@quick
@given(methods(EVICTIONS + GROWING), texts)
def test_no_layer_holds_more_than_its_budget_and_a_row(
    tiny: Make, method: Method, prompts: list[list[int]]
) -> None:
    model = tiny("qwen3", layers=3)
    grows = method["eviction"].value.grows
    keeps = grows is not None and grows(method["eviction"].params)
    for step, session in enumerate(walk(model, prompts, method, 6)):
        cache: EvictingCache = session._cache
        generated = [0, 1, 2, 3, 4, 5, 6, 9, 10][step]
        for sample, prompt in enumerate(prompts):
            seen = len(prompt) + generated
            for layer in range(3):
                budget = int(cache.budgets()[sample, layer])
                most = min(budget, len(prompt)) + generated if keeps else budget + 1
                for held in rows(cache, layer, sample):
                    assert len(set(held)) == len(held)
                    if step not in (0, 7):  # a cut may leave out the newest row, a step never
                        assert held[-1] == seen - 1
                    after_turn = step == 7 and not keeps
                    assert len(held) <= (budget if after_turn else most)
                    if keeps or seen <= budget:
                        assert len(held) == min(budget, len(prompt)) + generated
                    elif step:
                        assert len(held) >= budget


@quick
@given(st.sampled_from(EVICTIONS + GROWING), st.data(), texts)
def test_room_for_everything_is_full_attention(
    tiny: Make, eviction: dict[str, Any], data: st.DataObject, prompts: list[list[int]]
) -> None:
    model = tiny("llama", layers=3)
    longest = max(len(prompt) for prompt in prompts)
    budget = {
        "uniform": {"tokens": longest + 10},
        "squeeze_attention": {"tokens": longest + 10},
        "pyramidkv": {"tokens": longest + 10},
        "per_layer": {"tokens": [longest + 10] * 3},
    }
    kind = data.draw(st.sampled_from(sorted(budget)))
    method = resolve({**eviction, kind: budget[kind]})
    full = walk(model, prompts, resolve({}), 6)
    for session in walk(model, prompts, method, 6):
        torch.testing.assert_close(session.logits, next(full).logits, rtol=1e-4, atol=1e-4)


def save(model: TokenModel, session: Session, method: Method, ids: Tensor, tokens: int) -> Session:
    """Another session that goes on from the saved cache of one."""
    other = model.start(ids[:, -1:], new_tokens=0)
    weight = next(model.parameters())
    cache = open_cache(
        model.acting, method, batch=len(ids), tokens=tokens, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    state = {name: tensor.clone() for name, tensor in session._cache.state().items()}
    cache.restore(state)
    other._cache, other._next, other.logits = cache, session._next.clone(), session.logits
    for tensor in state.values():  # what was given is not held on to
        tensor.zero_()
    return other


@quick
@given(methods(EVICTIONS + GROWING), st.integers(0, 6), st.sampled_from([None, 1, 3]), texts)
def test_a_saved_cache_goes_on_to_the_last_bit(
    tiny: Make, method: Method, cut: int, refresh: int | None, prompts: list[list[int]]
) -> None:
    """In the middle of what a budget measures before it divides anew, too."""
    if refresh and method["budget"].value.name == "squeeze_attention":
        given = {a: c for a, c in method.choices.items() if a == "eviction"}
        if given["eviction"].value.name in ("sliding_window", "streaming_llm", "h2o"):
            again = {"squeeze_attention": {"tokens": 8, "refresh": refresh}}
            method = resolve({"h2o": {}, **again})
    model = tiny("llama", layers=3)
    ids, valid = left_pad(prompts, torch.device("cpu"))
    session = model.start(ids, valid, new_tokens=12, apply=method)
    for step in range(cut):
        session.step(torch.full((len(prompts),), step))
    other = save(model, session, method, ids, ids.shape[1] + 12)
    for step in range(12 - cut - 3):
        found = [each.step(torch.full((len(prompts),), 50 - step)) for each in (session, other)]
        assert torch.equal(*found)
    turn = torch.tensor([[1, 2]]).expand(len(prompts), -1)
    found = [each.extend(turn, new_tokens=1) for each in (session, other)]
    assert torch.equal(*found)
    assert torch.equal(session.step(turn[:, 0]), other.step(turn[:, 0]))
    for layer in range(3):
        assert torch.equal(session._cache.held(layer), other._cache.held(layer))
    assert torch.equal(session._cache.budgets(), other._cache.budgets())
    assert session.kv_bytes() == other.kv_bytes()


@quick
@given(
    st.sampled_from(EVICTIONS), st.integers(5, 9), st.integers(1, 4), st.integers(0, 99),
    st.sampled_from(["cosine", "mass"]),
)  # fmt: skip
def test_dividing_anew_keeps_the_total_and_the_best_rows(
    tiny: Make, eviction: dict[str, Any], tokens: int, refresh: int, seed: int, importance: str
) -> None:
    squeeze = {"tokens": tokens, "refresh": refresh, "importance": importance}
    model = tiny("llama", layers=4)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(53, (2, 16), generator=generator)
    session = model.start(
        ids, new_tokens=14, apply=resolve({**eviction, "squeeze_attention": squeeze})
    )
    cache = session._cache
    for step in range(14):
        before = [[rows(cache, layer, s) for layer in range(4)] for s in range(2)]
        session.step(torch.randint(53, (2,), generator=generator))
        divided = (step + 1) % refresh == 0
        for sample in range(2):
            assert int(cache.budgets()[sample].sum()) == 4 * tokens
            for layer, heads in enumerate(before[sample]):
                budget = int(cache.budgets()[sample, layer])
                for was, held in zip(heads, rows(cache, layer, sample), strict=False):
                    assert set(held) <= {*was, 16 + step}
                    if not divided:
                        assert held[-1] == 16 + step
                    assert len(held) <= (budget if divided else budget + 1)


def of_turns(
    turns: list[tuple[int, int]], budget: int, sinks: int
) -> list[tuple[list[int], list[int]]]:
    """What StreamingLLM holds after each turn and after its answer, worked out from positions."""
    kept: list[int] = []
    seen, found = 0, []
    for number, (prompt, answer) in enumerate(turns):
        if number:
            room = max(budget - prompt - answer, sinks)
            first = [row for row in kept if row < sinks]
            rest = [row for row in kept if row >= sinks]
            kept = first + rest[len(rest) - max(0, min(len(rest), room - len(first))) :]
        kept = kept + list(range(seen, seen + prompt))
        seen += prompt
        if len(kept) > budget:
            first = [row for row in kept if row < sinks]
            kept = first + kept[len(kept) - (budget - len(first)) :]
        after_turn = list(kept)
        for _ in range(answer):
            if len(kept) > budget:
                kept.remove(min(row for row in kept if row >= sinks))
            kept.append(seen)
            seen += 1
        found.append((after_turn, list(kept)))
    return found


@quick
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=2, max_size=4),
    st.integers(4, 24), st.integers(0, 3), st.sampled_from(["cache", "absolute"]),
)  # fmt: skip
def test_streaming_makes_room_for_turns(
    tiny: Make, turns: list[tuple[int, int]], budget: int, sinks: int, positions: str
) -> None:
    streaming = {"sinks": sinks, "turns": True, "positions": positions}
    method = resolve({"streaming_llm": streaming, "uniform": {"tokens": budget}})
    model = tiny("llama")
    total = sum(prompt + answer for prompt, answer in turns)
    session = None
    for (prompt, answer), (after, at_last) in zip(
        turns, of_turns(turns, budget, sinks), strict=True
    ):
        ids = torch.arange(prompt)[None] % 53
        if session is None:
            session = model.start(ids, new_tokens=total - prompt, apply=method)
        else:
            session.extend(ids, new_tokens=answer)
        assert rows(session._cache, 0, 0) == [after]
        for _ in range(answer):
            session.step(torch.tensor([9]))
        assert rows(session._cache, 0, 0) == [at_last]


@pytest.mark.parametrize("budget", ["uniform", "pyramidkv", "squeeze_attention"])
@pytest.mark.parametrize("kv_of", [(0, 1, 2, 3, 4, 5), (0, 1, 1, 1, 4, 4)])
def test_a_prompt_is_let_go_of_layer_by_layer(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, budget: str, kv_of: tuple[int, ...]
) -> None:
    """Whole layers alive when the next is written: those that are still to be read, no other.

    SqueezeAttention looks at all layers before it cuts any.
    """
    alive: list[int] = []
    written: list[weakref.ref[Tensor]] = []
    write = EvictingCache.write

    def counting(
        self: EvictingCache, layer: int, k: Tensor, v: Tensor, positions: Tensor | None
    ) -> None:
        alive.append(sum(each() is not None for each in written))
        written.append(weakref.ref(k.untyped_storage()))
        write(self, layer, k, v, positions)

    monkeypatch.setattr(EvictingCache, "write", counting)
    model = tiny("llama", layers=6, sharing=Sharing(kv_of))
    ids = torch.arange(40)[None].expand(2, -1)
    method = resolve({"h2o": {}, budget: {"tokens": 6}})
    session = model.start(ids, new_tokens=3, apply=method)
    whole = len(set(kv_of))
    assert len(alive) == whole
    if budget == "squeeze_attention":
        assert alive == list(range(whole))
    else:
        assert alive == [0] * whole
    assert sum(each() is not None for each in written) == 0
    rows_held = [session._cache._storage[layer].nbytes() for layer in sorted(set(kv_of))]
    slots = [int(n) + 1 for n in session._cache.budgets()[0]]
    assert rows_held == [2 * 2 * 2 * 8 * 4 * each for each in slots]


UPWARD = [(0, 2, 2, 3), (1, 1, 3, 3), (0, 3, 3, 3), (3, 1, 2, 0)]
"""Of the last one a layer's keys are read from below alone: in one pass over a prompt, by none."""


@pytest.mark.parametrize("kv_of", UPWARD)
@pytest.mark.parametrize("eviction", EVICTIONS + GROWING)
@pytest.mark.parametrize("passes", [1, 8])
def test_a_turn_over_layers_that_read_upward(
    tiny: Make, kv_of: tuple[int, ...], eviction: dict[str, Any], passes: int
) -> None:
    """They read a KV layer before a turn's rows are in it, and again with them."""
    sharing = Sharing(kv_of, forward_passes=passes - 1, backward_passes=1)
    model = tiny("llama", layers=4, sharing=sharing).double()
    prompts = [list(range(20, 34)), [4, 9, 1, 50, 7, 7, 3]]

    def logits(method: Method) -> list[Tensor]:
        return [session.logits.clone() for session in walk(model, prompts, method, 3)]

    roomy = logits(resolve({**eviction, "uniform": {"tokens": 40}}))
    for found, expected in zip(roomy, logits(resolve({})), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    tight = logits(resolve({**eviction, "uniform": {"tokens": 6}}))
    assert all(bool(found.isfinite().all()) for found in tight)
    assert not torch.allclose(tight[-1], roomy[-1], **EXACT)


@pytest.mark.parametrize("budget", [{}, {"squeeze_attention": {"importance": "mass"}}])
def test_a_prompt_whose_keys_nobody_reads(tiny: Make, budget: dict[str, Any]) -> None:
    """There is no attention to rank or to measure: of equal rows the first stay."""
    model = tiny("llama", layers=4, sharing=Sharing(UPWARD[-1]))
    method = resolve({"h2o": {"recent": 0.25}, **budget, "prefill": {"passes": 1}})
    session = model.start(torch.arange(40)[None], new_tokens=2, apply=method)
    if not budget:
        assert rows(session._cache, 3, 0) == [[0, 1, 2, 3, 4, 5, 38, 39]] * 2
    assert bool(session.step(torch.tensor([1])).isfinite().all())


@pytest.mark.parametrize(
    ("eviction", "share"), [(EVICTIONS[1], 1.0), (EVICTIONS[3], 1.0), (GROWING[2], 0.95)]
)
def test_what_a_layer_cannot_hold_of_a_sample_the_others_get(
    tiny: Make, eviction: dict[str, Any], share: float
) -> None:
    """Whatever the batch: of its own text, and where all that is generated stays of its prompt."""
    model = tiny("llama", layers=4).double()
    method = resolve({**eviction, "squeeze_attention": {"share": share, "p": 0.05}})
    prompts = [list(range(20)), [50, 3, 4, 19, 8, 8, 30, 2, 41, 6, 7, 12]]
    together = list(walk(model, prompts, method, 0))[-1]
    grows = method["eviction"].value.grows
    later = 0 if grows is not None and grows(method["eviction"].params) else 4
    for sample, prompt in enumerate(prompts):
        alone = list(walk(model, [prompt], method, 0))[-1]
        budgets = alone._cache.budgets()[0]
        assert torch.equal(together._cache.budgets()[sample], budgets)
        assert int(budgets.sum()) == 4 * int(share * len(prompt))
        assert int(budgets.max()) <= len(prompt) + later
        torch.testing.assert_close(together.logits[sample], alone.logits[0], **EXACT)
        if later == 0:
            predicted = cost_of(model.config, method).kv_bytes(len(prompt) + 4, 8, len(prompt))
            assert alone.kv_bytes() == pytest.approx(predicted, rel=0.01)
