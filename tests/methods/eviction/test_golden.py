"""The numbers of StreamingLLM, H2O, SnapKV and kvpress (tests/golden/eviction/README.json)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.kernels.attention import EMPTY, attend
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.interface import Cache, Keys, Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.cache.ranking import Rows
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.rope import Rotation, signed_frequencies
from kvlab.methods.eviction.observed_attention.ranking import ObservedAttention
from kvlab.methods.eviction.snapkv.ranking import SnapKV
from kvlab.methods.registry import resolve

FOLDERS = [Path(__file__).parents[2] / "golden/eviction"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]) / "eviction")
FILES = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))}
CLOSE = {"atol": 2e-5, "rtol": 0.0}
ModelOf = Callable[[dict[str, Any], dict[str, Tensor]], TokenModel]


class Case:
    """A golden file and what the README says of it."""

    def __init__(self, name: str) -> None:
        path = FILES[name]
        self.tensors = load_file(path)
        cases = json.loads((path.parent / "README.json").read_text())["cases"]
        self.about = next(case for case in cases if case["name"] == name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def layers(self) -> range:
        return range(self.about["model"]["num_hidden_layers"])


def named(*starts: str) -> list[str]:
    return [name for name in FILES if name.startswith(starts)]


def sorted_rows(places: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Places [B, H, n], and rows [B, H, n, D] of theirs, by place."""
    order = places.argsort(-1)
    sorted_ = [x.gather(2, order.unsqueeze(-1).expand(x.shape)) for x in rows]
    return places.gather(-1, order), *sorted_


def held(cache: EvictingCache, layer: int, heads: int) -> tuple[Tensor, ...]:
    """Positions [B, H, n], keys and values of the rows a layer holds, by position."""
    positions = cache.held(layer)
    full = int((positions[0, 0] != EMPTY).sum())
    assert bool(((positions != EMPTY).sum(-1) == full).all())
    k, v = cache._storage[layer].get(positions.shape[-1])
    found = sorted_rows(positions.expand(-1, heads, -1), k, v)
    return tuple(part[:, :, -full:] for part in found)


def kept(positions: Tensor, newest: int, budget: int) -> list[int]:
    """What one head [C] holds after a step, without the row that the next step will overwrite.

    Told by that next step: it wrote `newest` over it.
    """
    rows = [row for row in positions.tolist() if row not in (EMPTY, newest)]
    assert len(rows) <= budget
    return sorted(rows)


@pytest.mark.parametrize("name", named("streaming_tokens"))
def test_streaming_token_by_token(name: str, checkpoint: ModelOf) -> None:
    case = Case(name)
    ids, budget = case["in.token_ids"], case.about["start_size"] + case.about["recent_size"]
    method = resolve(
        {"streaming_llm": {"sinks": case.about["start_size"]}, "uniform": {"tokens": budget}}
    )
    model = checkpoint(case.about["model"], case.tensors)
    session = model.start(ids[None, :1], new_tokens=len(ids) - 1, apply=method)
    for step in range(len(ids)):
        if step:
            session.step(ids[None, step])
        torch.testing.assert_close(session.logits[0], case["out.logits"][step], **CLOSE)
        positions = session._cache.held(0)[0, 0]
        if step:
            golden = [row for row in case["out.kept_positions"][step - 1].tolist() if row >= 0]
            assert kept(positions, step, budget) == golden
    last = case["out.kept_positions"][-1]
    for layer in case.layers():
        places, k, v = held(session._cache, layer, case.about["model"]["num_key_value_heads"])
        stays = torch.isin(places[0, 0], last)
        assert stays.sum() == budget
        torch.testing.assert_close(k[:, :, stays], case[f"out.final_k.{layer}"], **CLOSE)
        torch.testing.assert_close(v[:, :, stays], case[f"out.final_v.{layer}"], **CLOSE)


@pytest.mark.parametrize("name", named("streaming_turns"))
def test_streaming_by_turns(name: str, checkpoint: ModelOf) -> None:
    case = Case(name)
    ids, budget = case["in.token_ids"], case.about["start_size"] + case.about["recent_size"]
    method = resolve(
        {
            "streaming_llm": {"sinks": case.about["start_size"], "turns": True},
            "uniform": {"tokens": budget},
        }
    )
    model = checkpoint(case.about["model"], case.tensors)
    session, fed, calls = None, 0, 0
    for prompt, answer in case.about["turns"]:
        turn = ids[None, fed : fed + prompt]
        if session is None:
            session = model.start(turn, new_tokens=len(ids) - prompt, apply=method)
        else:
            session.extend(turn, new_tokens=answer)
        fed += prompt
        for token in range(answer + 1):
            if token:
                session.step(ids[None, fed])
                fed += 1
            torch.testing.assert_close(session.logits[0], case["out.logits"][fed - 1], **CLOSE)
            found = held(session._cache, 0, 1)[0][0, 0].tolist()
            golden = case["out.kept_positions"][calls]
            assert found == [row for row in golden.tolist() if row >= 0]
            calls += 1
    assert calls == len(case["out.kept_positions"])
    for layer in case.layers():
        _, k, v = held(session._cache, layer, case.about["model"]["num_key_value_heads"])
        torch.testing.assert_close(k, case[f"out.final_k.{layer}"], **CLOSE)
        torch.testing.assert_close(v, case[f"out.final_v.{layer}"], **CLOSE)


@pytest.mark.parametrize("name", named("h2o_real", "h2o_rolling"))
def test_h2o(name: str, checkpoint: ModelOf) -> None:
    case = Case(name)
    heavy, recent = case.about["hh_size"], case.about["recent_size"]
    budget = heavy + recent
    positions = "cache" if "rolling" in case.about["algo"] else "absolute"
    method = resolve(
        {"h2o": {"recent": recent / budget, "positions": positions}, "uniform": {"tokens": budget}}
    )
    model = checkpoint(case.about["model"], case.tensors)
    tokens = case["in.decode_ids"]
    session = model.start(case["in.prompt_ids"], new_tokens=len(tokens) + 1, apply=method)
    cache, prompt = session._cache, case["in.prompt_ids"].shape[1]
    golden = case["out.kept_positions"]
    for step in range(len(tokens) + 1):
        torch.testing.assert_close(session.logits[0], case["out.logits"][step], **CLOSE)
        scored = {layer: score_of(cache, layer) for layer in case.layers()}
        if step == len(tokens):  # any token shows what the step before it left
            places = {layer: held(cache, layer, 4) for layer in case.layers()}
        session.step(tokens[None, min(step, len(tokens) - 1)])
        for layer in case.layers():
            for head, slots in enumerate(cache.held(layer)[0]):
                rows = golden[step, layer, head].tolist()
                assert kept(slots, prompt + step, budget) == rows
                scores = torch.tensor([scored[layer][head][row] for row in rows])
                expected = case[f"out.hh_score.{step}"][layer, head]
                torch.testing.assert_close(scores, expected, **CLOSE)
    for layer, (where, k, v) in places.items():
        for head in range(4):
            stays = torch.isin(where[0, head], golden[-1, layer, head])
            for found, part in ((k, "k"), (v, "v")):
                expected = case[f"out.final_{part}.{layer}"][0, head]
                torch.testing.assert_close(found[0, head, stays], expected, **CLOSE)


def score_of(cache: EvictingCache, layer: int) -> list[dict[int, float]]:
    """For each head, what each position that is held has scored."""
    scores = cache._table[layer].scores_at(layer)
    assert scores is not None
    pairs = zip(cache.held(layer)[0].tolist(), scores[0].tolist(), strict=True)
    return [dict(zip(rows, found, strict=True)) for rows, found in pairs]


class MaskedH2O(Cache):
    """H2O's masking simulation: all rows are kept, and after each pass most are hidden.

    Of k rows the heavy hitters are found among all but the newest `recent`; of the k + 1 that the
    next query could read the newest `recent` are shown. So the row that has just left the recent
    ones is hidden once, and may come back; the score of every other hidden row is lost.
    """

    def __init__(self, heavy: int, recent: int) -> None:
        self.heavy, self.recent = heavy, recent
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.scores: dict[int, Tensor] = {}
        self.shown: dict[int, Tensor] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if layer in self.rows:
            k = torch.cat((self.rows[layer][0], k), dim=2)
            v = torch.cat((self.rows[layer][1], v), dim=2)
        self.rows[layer] = k, v

    def read(self, layer: int) -> Keys | None:
        k, v = self.rows[layer]
        if layer not in self.shown:
            return Keys(k, v, None)
        places = torch.arange(k.shape[2]).expand(k.shape[:3])
        return Keys(k, v, places.masked_fill(~self.shown[layer], EMPTY))

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert key_mass is not None
        scores = key_mass.clone()
        if layer in self.scores:
            scores[..., :-1] += self.scores[layer]
        shown = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
        shown[..., -self.recent :] = True
        heavy = scores[..., : -self.recent].topk(self.heavy, dim=-1).indices
        self.shown[layer] = shown.scatter(-1, heavy, True)
        counted = self.shown[layer][..., :-1].clone()
        counted[..., -self.recent :] = True
        self.scores[layer] = scores * counted

    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.rows.values())


@pytest.mark.parametrize("name", named("h2o_sim"))
def test_h2o_as_a_simulation(name: str, checkpoint: ModelOf) -> None:
    """Another way to evict, through the seam alone; it is no value that ships."""
    case = Case(name)
    cache = MaskedH2O(case.about["heavy_budget"], case.about["recent_budget"])
    decoder = checkpoint(case.about["model"], case.tensors).decoder
    ids, positions = case["in.prompt_ids"], None
    for step, golden in enumerate(case["out.logits"]):
        with torch.inference_mode():
            hidden = decoder.body(decoder.embed(ids), positions, cache, ids)
            torch.testing.assert_close(decoder.head(hidden[:, -1])[0], golden, **CLOSE)
        for layer in case.layers():
            mask = case[f"out.mask_next.{step}"][layer].bool()
            assert torch.equal(cache.shown[layer][0], mask)
            expected = case[f"out.score.{step}"][layer]
            torch.testing.assert_close(cache.scores[layer][0], expected, **CLOSE)
        if step < len(case["in.decode_ids"]):
            ids = case["in.decode_ids"][None, step : step + 1]
            positions = torch.tensor([[case["in.prompt_ids"].shape[1] + step]])


def of_press(about: dict[str, Any], rows: int) -> dict[str, Any]:
    """The method that a press is; `rows` of prompt."""
    kind, share = about["press"], 1 - about.get("ratio", 0.0)
    sinks = {"sinks": about.get("n_sink"), "generated": "keep", "positions": "absolute"}
    uniform = {"uniform": {"tokens": int(rows * share)}}
    if kind == "streaming":
        return {"streaming_llm": sinks, **uniform}
    if kind == "streaming_rerotated":
        return {"streaming_llm": sinks | {"positions": "cache"}, **uniform}
    if kind == "observed":
        return {"observed_attention": {}, **uniform}
    if kind == "per_layer_streaming":
        tokens = [int(rows * (1 - ratio)) for ratio in about["ratios"]]
        return {"streaming_llm": sinks, "per_layer": {"tokens": tokens}}
    snapkv = {"snapkv": {"window": about["window_size"], "kernel": about["kernel_size"]}}
    if kind == "snapkv":
        return snapkv | uniform
    assert kind == "pyramidkv"
    return snapkv | {"pyramidkv": {"share": share, "beta": about["beta"], "rule": "kvpress"}}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What SnapKV and observed attention rank by, in the order of the layers."""
    found: list[Tensor] = []
    for ranking in (SnapKV, ObservedAttention):

        def recorded(self: Any, rows: Rows, rank: Any = ranking.rank) -> Tensor:
            found.append(rank(self, rows))
            return found[-1]

        monkeypatch.setattr(ranking, "rank", recorded)
    return found


@pytest.mark.parametrize("name", named("kvpress"))
def test_kvpress(name: str, checkpoint: ModelOf, ranks: list[Tensor]) -> None:
    case = Case(name)
    about, ids, tokens = case.about, case["in.prompt_ids"], case["in.decode_ids"]
    prompt, count, heads = ids.shape[1], tokens.shape[1], about["model"]["num_key_value_heads"]
    model = checkpoint(about["model"], case.tensors)
    method = resolve(of_press(about, prompt))
    session = model.start(ids, new_tokens=count, apply=method)
    torch.testing.assert_close(session.logits, case["out.prefill_last_logits"], **CLOSE)
    for layer in case.layers():
        places, k, v = held(session._cache, layer, heads)
        if about["press"] == "streaming_rerotated":
            turns = signed_frequencies(model.config)
            k = Rotation(turns, torch.arange(k.shape[2])[None], k.dtype)(k)
        theirs = (case[f"out.{part}.{layer}"] for part in ("kept_index", "k", "v"))
        index, *rows = sorted_rows(*theirs)
        assert torch.equal(places, index.long())
        torch.testing.assert_close(k, rows[0], **CLOSE)
        torch.testing.assert_close(v, rows[1], **CLOSE)
        if "n_kept" in about:
            assert places.shape[-1] == about["n_kept"][layer]
    group = about["model"]["num_attention_heads"] // heads
    window = about.get("window_size", 0)
    for layer, found in enumerate(ranks):  # theirs are means over the queries and the group
        golden = case[f"out.score.{layer}"][..., : prompt - window]
        means = found[..., : prompt - window] / (group * max(1, window))
        torch.testing.assert_close(means, golden, **CLOSE)
    assert len(ranks) in (0, len(case.layers()))
    assert bool(ranks) == ("streaming" not in about["press"])
    for step in range(count):
        session.step(tokens[:, step])
        torch.testing.assert_close(session.logits, case["out.decode_logits"][:, step], **CLOSE)
    for layer in case.layers():  # none left while decoding
        rows = case[f"out.kept_index.{layer}"].shape[-1] + count
        assert held(session._cache, layer, heads)[0].shape[-1] == rows


@pytest.mark.parametrize("name", named("kvpress_per_layer"))
def test_budgets_by_layer_as_shares(name: str, checkpoint: ModelOf) -> None:
    """Shares of a prompt stand for the same rows."""
    case = Case(name)
    shares = {"shares": [1 - ratio for ratio in case.about["ratios"]]}
    method = resolve({"streaming_llm": {"generated": "keep"}, "per_layer": shares})
    model = checkpoint(case.about["model"], case.tensors)
    session = model.start(case["in.prompt_ids"], new_tokens=0, apply=method)
    kept_rows = [case[f"out.kept_index.{layer}"].shape[-1] for layer in case.layers()]
    assert session._cache.budgets().tolist() == [kept_rows]


@pytest.mark.parametrize("name", named("snapkv_ref"))
def test_snapkv_by_query_head(name: str, ranks: list[Tensor]) -> None:
    case = Case(name)
    a, q, k, v = case.about, case["in.q"], case["in.k"], case["in.v"]
    params = {
        "window": a["window_size"], "kernel": a["kernel_size"],
        "pooling": {"avgpool": "average", "maxpool": "max"}[a["pooling"]],
        "heads": {"query_head": "query", "kv_head": "kv"}[a["granularity"]],
    }  # fmt: skip
    method = resolve({"snapkv": params, "uniform": {"tokens": a["max_capacity_prompt"]}})
    sizes = llama(a["H"] * a["d"], 1, a["H"], a["G"], 8)
    cache = open_cache(
        DecoderConfig(vocab_size=8, **sizes), method, batch=a["B"], tokens=a["T"],
        device=q.device, dtype=q.dtype,
    )  # fmt: skip
    assert isinstance(cache, EvictingCache)
    cache.plan(Step(a["T"], None, None))
    cache.write(0, k, v, None)
    keys = cache.read(0)
    assert keys is not None
    _, mass = attend(q, keys.k, keys.v, None, keys.positions, mass_rows=cache.key_mass_rows(0))
    cache.observe(0, q, q, mass)
    cache.finish()
    heads = case["out.k.0"].shape[1]
    found = held(cache, 0, heads)
    index, *rows = sorted_rows(case["out.kept_index.0"], case["out.k.0"], case["out.v.0"])
    assert torch.equal(found[0], index.long())
    torch.testing.assert_close(found[1], rows[0], **CLOSE)
    torch.testing.assert_close(found[2], rows[1], **CLOSE)
    votes = ranks[0][..., : a["T"] - a["window_size"]]
    torch.testing.assert_close(votes, case["out.score.0"], **CLOSE)
