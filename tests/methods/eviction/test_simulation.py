"""What stays, against slow twins in plain Python that see the attention of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.decoder.config import Sharing
from kvlab.methods.decoder.generation import left_pad
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

Make = Callable[..., TokenModel]
Scores = dict[int, float]
"""Position -> what its row scored."""
HEADS, KV_HEADS, LAYERS = 4, 2, 4
MAPS = [(0, 1, 2, 3), (0, 1, 1, 1), (0, 0, 2, 2), (0, 2, 2, 3)]
"""The last one reads upward: in passes over a prompt."""
quick = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
texts = st.lists(st.lists(st.integers(0, 52), min_size=5, max_size=18), min_size=1, max_size=3)


class Seen:
    """Records, for each decoder layer, sample and query head, the attention that positions got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: dict[int, list[list[Scores]]] = {}
        observe = EvictingCache.observe

        def recorded(
            cache: EvictingCache, layer: int, before: Tensor, after: Tensor, mass: Tensor | None
        ) -> None:
            if mass is not None:
                self.last[layer] = self._by_position(cache, layer, mass)
            observe(cache, layer, before, after, mass)

        monkeypatch.setattr(EvictingCache, "observe", recorded)

    def _by_position(self, cache: EvictingCache, layer: int, mass: Tensor) -> list[list[Scores]]:
        keys = cache.read(cache._kv_of[layer])
        assert keys is not None
        places = keys.positions
        if places is None and not cache._seen:
            places = torch.arange(mass.shape[-1])[None, None]
        elif places is None:
            places = cache.held(cache._kv_of[layer])[..., : mass.shape[-1]]
        places = places if places.dim() == 3 else places[:, None]
        group = HEADS // places.shape[1]
        where = places.repeat_interleave(group, 1).expand(mass.shape).tolist()
        return [
            [
                {p: m for p, m in zip(*pair, strict=True) if p != EMPTY}
                for pair in zip(*sample, strict=True)
            ]
            for sample in zip(where, mass.tolist(), strict=True)
        ]

    def of(self, readers: Iterable[int], sample: int, heads: Iterable[int]) -> Scores:
        """The sum over decoder layers and query heads."""
        total: Scores = {}
        for reader in readers:
            for head in heads:
                for place, mass in self.last[reader][sample][head].items():
                    total[place] = total.get(place, 0.0) + mass
        return total


def best(scores: Scores, protected: set[int], budget: int) -> set[int]:
    """The protected rows and the highest scores, so many in all."""
    rest = sorted((row for row in scores if row not in protected), key=lambda row: -scores[row])
    return protected | set(rest[: max(0, budget - len(protected))])


def readers_of(kv_of: tuple[int, ...]) -> dict[int, list[int]]:
    return {kv: [i for i, source in enumerate(kv_of) if source == kv] for kv in sorted(set(kv_of))}


def held(cache: EvictingCache, layer: int, sample: int, head: int) -> set[int]:
    found = cache.held(layer)[sample, head].tolist()
    return {row for row in found if row != EMPTY}


def sharing(kv_of: tuple[int, ...]) -> dict[str, Any]:
    own = kv_of == tuple(range(LAYERS))
    return {"layers": LAYERS, "sharing": None if own else Sharing(kv_of)}


@quick
@given(
    texts, st.sampled_from(MAPS), st.integers(2, 9), st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(["absolute", "cache"]), st.booleans(),
)  # fmt: skip
def test_h2o(
    tiny: Make, prompts: list[list[int]], kv_of: tuple[int, ...], budget: int, recent: float,
    positions: str, squeezed: bool,
) -> None:  # fmt: skip
    """Heavy hitters of each KV head, summed over its queries, its query heads, its readers."""
    model = tiny("llama", **sharing(kv_of))
    readers = readers_of(kv_of)
    tokens = [budget + 2 * (i % 2) * squeezed for i in range(len(readers))]
    method = resolve(
        {"h2o": {"recent": recent, "positions": positions}, "per_layer": {"tokens": tokens}}
    )
    ids, valid = left_pad(prompts, torch.device("cpu"))
    keys = [(kv, s, h) for kv in readers for s in range(len(prompts)) for h in range(KV_HEADS)]
    scores: dict[tuple[int, int, int], Scores] = {key: {} for key in keys}
    present: dict[tuple[int, int, int], set[int]] = {key: set() for key in keys}
    lengths = [len(prompt) for prompt in prompts]
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Seen(monkeypatch)
        session = model.start(ids, valid, new_tokens=14, apply=method)
        for number, rows in enumerate([None, 1, 1, 1, 1, 1, 3, 1, 1, 4]):
            text = torch.full((len(prompts), rows or 1), 5 * number) + ids[:, -1:]
            if rows == 1:
                session.step(text[:, 0] % 53)
            elif rows:
                session.extend(text % 53)
            for key in keys:
                kv, sample, head = key
                budget = tokens[list(readers).index(kv)]
                newest = lengths[sample] - 1
                new = set(range(newest + 1))
                if rows == 1:  # a row has left before the new one is read
                    present[key] = h2o(present[key], scores[key], newest, budget, recent)
                if rows:
                    new = set(range(newest + 1, newest + 1 + rows))
                    newest += rows
                present[key] |= new
                grown = seen.of(readers[kv], sample, (2 * head, 2 * head + 1))
                assert set(grown) == present[key]
                scores[key] = {r: scores[key].get(r, 0.0) + mass for r, mass in grown.items()}
                if rows != 1:
                    present[key] = h2o(present[key], scores[key], newest, budget, recent)
                assert held(session._cache, kv, sample, head) == present[key]
            lengths = [length + (rows or 0) for length in lengths]


def h2o(present: set[int], scores: Scores, newest: int, budget: int, recent: float) -> set[int]:
    cut = newest - int(budget * recent + 0.5)
    protected = {row for row in present if row > cut}
    return best({row: scores[row] for row in present}, protected, budget)


def pooled(votes: Scores, kernel: int, pooling: str) -> Scores:
    """Over neighbours, in positions; beyond the ends is nothing."""
    found: Scores = {}
    for row in votes:
        near = [votes[row + d] for d in range(-(kernel // 2), kernel // 2 + 1) if row + d in votes]
        found[row] = max(near) if pooling == "max" else sum(near) / kernel
    return found


@quick
@given(
    texts, st.sampled_from(MAPS), st.integers(1, 5), st.integers(1, 6),
    st.sampled_from([1, 3, 5]), st.sampled_from(["average", "max"]),
    st.sampled_from(["kv", "query"]), st.sampled_from(["mean", "pooled"]),
)  # fmt: skip
def test_snapkv(
    tiny: Make, prompts: list[list[int]], kv_of: tuple[int, ...], window: int, more: int,
    kernel: int, pooling: str, heads: str, votes: str,
) -> None:  # fmt: skip
    model = tiny("llama", **sharing(kv_of))
    budget = window + more
    params = {
        "window": window, "kernel": kernel, "pooling": pooling, "heads": heads, "votes": votes,
    }  # fmt: skip
    method = resolve({"snapkv": params, "uniform": {"tokens": budget}})
    ids, valid = left_pad(prompts, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Seen(monkeypatch)
        session = model.start(ids, valid, new_tokens=3, apply=method)
        after = expected(seen, prompts, kv_of, budget, params)
        for (kv, sample, head), rows in after.items():
            assert held(session._cache, kv, sample, head) == rows
        for step in range(3):
            session.step(ids[:, step])
            for (kv, sample, head), rows in after.items():
                generated = {len(prompts[sample]) + i for i in range(step + 1)}
                assert held(session._cache, kv, sample, head) == rows | generated


def expected(
    seen: Seen,
    prompts: list[list[int]],
    kv_of: tuple[int, ...],
    budget: int,
    params: dict[str, Any],
) -> dict[tuple[int, int, int], set[int]]:
    """What SnapKV keeps: (KV layer, sample, head) -> positions."""
    found = {}
    for kv, readers in readers_of(kv_of).items():
        for sample, prompt in enumerate(prompts):
            old = range(max(0, len(prompt) - params["window"]))
            by_query = []
            for head in range(HEADS):
                votes = seen.of(readers, sample, [head])
                by_query.append({row: votes[row] for row in old})
            groups = [[head] for head in range(HEADS)]
            if params["heads"] == "kv":
                groups = [[0, 1], [2, 3]]
            for number, group in enumerate(groups):
                if params["votes"] == "pooled":
                    ready = [
                        pooled(by_query[h], params["kernel"], params["pooling"]) for h in group
                    ]
                    scores = {row: sum(each[row] for each in ready) for row in old}
                else:
                    total = {row: sum(by_query[h][row] for h in group) for row in old}
                    scores = pooled(total, params["kernel"], params["pooling"])
                newest = set(range(len(old), len(prompt)))
                found[kv, sample, number] = best(dict(scores), newest, budget)
    return found


@quick
@given(texts, st.sampled_from(MAPS), st.integers(1, 8))
def test_observed_attention(
    tiny: Make, prompts: list[list[int]], kv_of: tuple[int, ...], budget: int
) -> None:
    """Mean attention of the queries that could see a row; no row is safe."""
    model = tiny("llama", **sharing(kv_of))
    method = resolve({"observed_attention": {}, "uniform": {"tokens": budget}})
    ids, valid = left_pad(prompts, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Seen(monkeypatch)
        session = model.start(ids, valid, new_tokens=0, apply=method)
        for kv, readers in readers_of(kv_of).items():
            for sample, prompt in enumerate(prompts):
                for head in range(KV_HEADS):
                    mass = seen.of(readers, sample, (2 * head, 2 * head + 1))
                    means = {row: m / (len(prompt) - row) for row, m in mass.items()}
                    assert len(means) == len(prompt)
                    assert held(session._cache, kv, sample, head) == best(means, set(), budget)


@quick
@given(texts, st.integers(0, 3), st.integers(1, 6), st.sampled_from(["cache", "absolute"]))
def test_streaming_and_windows(
    tiny: Make, prompts: list[list[int]], sinks: int, more: int, positions: str
) -> None:
    model = tiny("llama")
    ids, valid = left_pad(prompts, torch.device("cpu"))
    budget = sinks + more
    for name, first, params in (
        ("streaming_llm", sinks, {"sinks": sinks, "positions": positions}),
        ("sliding_window", 0, {}),
    ):
        method = resolve({name: params, "uniform": {"tokens": budget}})
        session = model.start(ids, valid, new_tokens=9, apply=method)
        for step in range(10):
            if step:
                session.step(ids[:, -1])
            for sample, prompt in enumerate(prompts):
                total = len(prompt) + step
                rows = budget + (step > 0)
                kept = set(range(min(first, total)))
                kept |= set(range(max(0, total - (rows - first)), total))
                assert held(session._cache, 0, sample, 0) == kept
