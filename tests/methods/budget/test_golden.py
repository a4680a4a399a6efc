"""The numbers of SqueezeAttention and PyramidKV (tests/golden/{squeeze,eviction}/README.json)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlab.kernels.attention import EMPTY, attend
from kvlab.methods.budget.budget import Evidence
from kvlab.methods.budget.squeeze_attention.budget import SqueezeAttention, shares_of
from kvlab.methods.budget.squeeze_attention.grouping import three_means
from kvlab.methods.budget.squeeze_attention.params import SqueezeParams
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.importance import Importance
from kvlab.methods.cache.interface import Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.cache.ranking import Rows
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.eviction.snapkv.ranking import SnapKV
from kvlab.methods.registry import resolve

FOLDERS = [Path(__file__).parents[2] / "golden"]
if "KVLAB_GOLDEN" in os.environ:
    FOLDERS.append(Path(os.environ["KVLAB_GOLDEN"]))
FILES = {
    path.stem: path
    for folder in FOLDERS
    for part in ("squeeze", "eviction")
    for path in sorted((folder / part).glob("*.safetensors"))
}
CLOSE = {"atol": 2e-5, "rtol": 0.0}
BASE = 8000
"""What the repository's Mistral multiplies its shares by, whatever the prompt."""
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

    def squeeze(self, rows: float | None = None) -> dict[str, Any]:
        """The budget; `rows` on average, if not a share of the prompt."""
        amount = {"share": self.about["ini_size"]} if rows is None else {"tokens": rows}
        p = self.about["percent"] / self.about["ini_size"]
        return {"squeeze_attention": amount | {"p": p, "rounding": "truncate"}}


def named(*starts: str) -> list[str]:
    return [name for name in FILES if name.startswith(starts)]


def walk(case: Case, model: TokenModel, method: dict[str, Any]) -> Iterator[EvictingCache]:
    """Feed the prompt and each token; compare the logits and show the cache after each."""
    tokens = case["in.decode_ids"]
    session = model.start(case["in.prompt_ids"], new_tokens=len(tokens), apply=resolve(method))
    for step, golden in enumerate(case["out.logits"]):
        if step:
            session.step(tokens[None, step - 1])
        torch.testing.assert_close(session.logits[0], golden, **CLOSE)
        yield session._cache


def compare_rows(case: Case, cache: EvictingCache, layer: int) -> None:
    """Positions in the last step, keys and values; all heads hold the same rows here."""
    places = cache.held(layer)[0, 0]
    order = places.argsort()[int((places == EMPTY).sum()) :]
    golden = case["out.kept_positions"][-1, layer]
    assert places[order].tolist() == golden[golden >= 0].tolist()
    k, v = cache._storage[layer].get(len(places))
    torch.testing.assert_close(k[:, :, order], case[f"out.final_k.{layer}"], **CLOSE)
    torch.testing.assert_close(v[:, :, order], case[f"out.final_v.{layer}"], **CLOSE)


@pytest.fixture
def cosines(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The mean cosines [B, layers] that caches divide their budgets by."""
    found: list[Tensor] = []
    measured = Importance.cosines

    def recorded(self: Importance, layers: int) -> Tensor | None:
        cosines = measured(self, layers)
        if cosines is not None:
            found.append(cosines)
        return cosines

    monkeypatch.setattr(Importance, "cosines", recorded)
    return found


def compare_groups(case: Case, cosines: list[Tensor]) -> None:
    """The first prompt's cosines, and the groups they make."""
    torch.testing.assert_close(cosines[0][0], case["out.cos_mean"], **CLOSE)
    assert [group + 1 for group in three_means(cosines[0][0].tolist())] == case.about["groups"]


@pytest.mark.parametrize("name", named("squeeze_streaming"))
def test_squeezed_streaming(name: str, checkpoint: ModelOf, cosines: list[Tensor]) -> None:
    case = Case(name)
    model = checkpoint(case.about["model"], case.tensors)
    method = {"streaming_llm": {"sinks": case.about["start_size"]}, **case.squeeze()}
    for step, cache in enumerate(walk(case, model, method)):
        for layer, golden in enumerate(case["out.kept_positions"][step - 1] if step else []):
            rows = sorted(row for row in cache.held(layer)[0, 0].tolist() if row != EMPTY)
            assert rows == golden[golden >= 0].tolist()
    compare_groups(case, cosines)
    assert cache.budgets().tolist() == [case["out.budget"].tolist()]
    for layer in range(model.config.layers):
        compare_rows(case, cache, layer)


@pytest.mark.parametrize("name", named("squeeze_window"))
def test_squeezed_windows(name: str, checkpoint: ModelOf, cosines: list[Tensor]) -> None:
    """Their budgets count the query's own row."""
    case = Case(name)
    model = checkpoint(case.about["model"], case.tensors)
    prompt = case["in.prompt_ids"]
    squeeze = case.squeeze(round(case.about["ini_size"] * BASE))
    method = resolve({"sliding_window": {}, **squeeze})
    divided = model.start(prompt, new_tokens=len(case["in.decode_ids"]), apply=method)
    compare_groups(case, cosines)
    assert divided._cache.budgets().tolist() == [case["out.budget"].tolist()]
    tokens = [rows - 1 for rows in case["out.budget"].tolist()]
    windows = {"sliding_window": {}, "per_layer": {"tokens": tokens}}
    for step, cache in enumerate(walk(case, model, windows)):
        for layer, golden in enumerate(case["out.kept_positions"][step - 1] if step else []):
            rows = sorted(row for row in cache.held(layer)[0, 0].tolist() if row != EMPTY)
            assert rows == golden[golden >= 0].tolist()
    for layer in range(model.config.layers):
        compare_rows(case, cache, layer)


@pytest.mark.parametrize("name", named("squeeze_h2o"))
def test_squeezed_h2o(name: str, checkpoint: ModelOf, cosines: list[Tensor]) -> None:
    """Each half of a layer's rows is truncated on its own."""
    case = Case(name)
    model = checkpoint(case.about["model"], case.tensors)
    prompt = case["in.prompt_ids"]
    h2o = {"h2o": {"positions": "cache" if case.about["rolling"] else "absolute"}}
    model.start(prompt, new_tokens=0, apply=resolve({**h2o, **case.squeeze()}))
    compare_groups(case, cosines)
    share = case.about["ini_size"]
    shares = shares_of(cosines[0][0].tolist(), case.about["percent"] / share)
    half = case["out.half_budget"]
    assert (shares * share * prompt.shape[1]).long().tolist() == half.tolist()
    method = {**h2o, "per_layer": {"tokens": (2 * half).tolist()}}
    golden = case["out.kept_positions"]
    newest = prompt.shape[1] - 1
    # A step writes its row over the one that theirs had evicted at the end of the step before.
    for step, cache in enumerate(walk(case, model, method)):
        before = golden[max(0, step - 1)]
        for layer in range(model.config.layers):
            for head, rows in enumerate(cache.held(layer)[0].tolist()):
                stayed = before[layer, head]
                written = [newest + step] if step else []
                expected = stayed[stayed >= 0].tolist() + written
                assert sorted(row for row in rows if row != EMPTY) == expected


@pytest.mark.parametrize("name", named("squeeze_grouping"))
def test_groups_and_truncated_budgets(name: str) -> None:
    case = Case(name)
    for number, about in enumerate(case.about["vectors"]):
        cosines = case[f"in.cos_mean.{number}"]
        groups = three_means(cosines.tolist())
        assert [group + 1 for group in groups] == case[f"out.group.{number}"].tolist()
        p = about["percent"] / about["ini_size"]
        budget = SqueezeAttention(SqueezeParams(about["ini_size"], p=p, rounding="truncate"))
        evidence = Evidence(
            prompt=torch.tensor([about["prompt_len"]]),
            most=torch.tensor([about["prompt_len"]]),
            least=1,
            window=0,
            readers=tuple((layer,) for layer in range(about["L"])),
            cosines=cosines[None],
        )
        rows = budget.rows(evidence)[0]
        assert rows.tolist() == case[f"out.budget.{number}"].tolist()
        assert rows.sum() == about["sum_budget"]


@pytest.mark.parametrize("name", named("pyramid_ref"))
def test_pyramid_of_the_repository(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same queries, keys and values in every layer."""
    case = Case(name)
    a, q, k, v = case.about, case["in.q"], case["in.k"], case["in.v"]
    ranks: list[Tensor] = []
    rank = SnapKV.rank

    def recorded(self: SnapKV, rows: Rows) -> Tensor:
        ranks.append(rank(self, rows))
        return ranks[-1]

    monkeypatch.setattr(SnapKV, "rank", recorded)
    method = resolve(
        {
            "snapkv": {"window": a["window_size"], "kernel": a["kernel_size"]},
            "pyramidkv": {"tokens": a["max_capacity_prompt"], "beta": a["beta"], "rule": "paper"},
        }
    )
    sizes = llama(a["H"] * a["d"], a["layers"], a["H"], a["G"], 8)
    cache = open_cache(
        DecoderConfig(vocab_size=8, **sizes), method, batch=a["B"], tokens=a["T"],
        device=q.device, dtype=q.dtype,
    )  # fmt: skip
    assert isinstance(cache, EvictingCache)
    cache.plan(Step(a["T"], None, None))
    for layer in range(a["layers"]):
        cache.write(layer, k, v, None)
        keys, seen = cache.read(layer), cache.key_mass_rows(layer)
        assert keys is not None
        _, mass = attend(q, keys.k, keys.v, None, None, mass_rows=seen)
        cache.observe(layer, q, q, mass)
    cache.finish()
    assert cache.budgets().tolist() == [a["n_kept"]]
    for layer, kept in enumerate(a["n_kept"]):
        places = cache.held(layer)
        rows = cache._storage[layer].get(kept)
        theirs = case[f"out.kept_index.{layer}"].long()
        order = theirs.argsort(-1)
        assert torch.equal(places, theirs.gather(-1, order))
        for found, part in zip(rows, "kv", strict=True):
            golden = case[f"out.{part}.{layer}"]
            golden = golden.gather(2, order.unsqueeze(-1).expand(golden.shape))
            torch.testing.assert_close(found, golden, **CLOSE)
        votes = ranks[layer][..., : a["T"] - a["window_size"]] / (a["H"] // a["G"])
        torch.testing.assert_close(votes, case[f"out.score.{layer}"], **CLOSE)
