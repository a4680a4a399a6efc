"""The pool's cache against sessions of one request each: the same logits, wherever rows lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvlab.methods.axis import Method
from kvlab.methods.build import build
from kvlab.methods.cache import pool
from kvlab.methods.cache.ragged import Batch
from kvlab.methods.decoder import rope
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve
from kvlab.platform.serving.demand import Slots, demand_of, under

VOCABULARY, LIMIT, BLOCK = 53, 96, 4
METHODS: dict[str, dict[str, Any]] = {
    "sliding_window": {"sliding_window": {}, "uniform": {"tokens": 6}},
    "streaming_llm": {"streaming_llm": {}, "uniform": {"tokens": 8}},
    "streaming_absolute": {"streaming_llm": {"positions": "absolute"}, "uniform": {"tokens": 8}},
    "streaming_keep": {"streaming_llm": {"generated": "keep"}, "uniform": {"tokens": 8}},
    "h2o": {"h2o": {}, "uniform": {"tokens": 6}},
    "h2o_cache": {"h2o": {"positions": "cache"}, "uniform": {"tokens": 6}},
    "h2o_keep": {"h2o": {"generated": "keep"}, "uniform": {"share": 0.5}},
    "snapkv": {"snapkv": {"window": 3}, "uniform": {"tokens": 7}},
    "snapkv_by_query": {"snapkv": {"window": 3, "heads": "query"}, "uniform": {"tokens": 7}},
    "observed_attention": {"observed_attention": {}, "uniform": {"share": 0.4}},
    "per_layer": {"h2o": {}, "per_layer": {"tokens": [9, 4, 6]}},
    "squeeze": {"h2o": {}, "squeeze_attention": {"tokens": 8}},
    "squeeze_streaming": {"streaming_llm": {}, "squeeze_attention": {"share": 0.5, "p": 0.5}},
    "pyramidkv": {"snapkv": {"window": 3}, "pyramidkv": {"tokens": 8}},
}
ADORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "release_alone": {"rebuild": 0},
    "refresh": {"refresh": 3},
    "every": {"every": 2, "threshold": 0.5},
    "context": {"rebuild": 6, "context": 2},
    "rule": {"scores": "rule"},
    "per_layer": {"per": "layer"},
    "per_layer_rule": {"per": "layer", "scores": "rule", "refresh": 2},
}


class Counting(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Engine:
    """Joins and ends requests of a pool at will, as a server's engine does."""

    def __init__(
        self, model: LanguageModel, apply: Mapping[str, Any], longest: int = LIMIT
    ) -> None:
        self.model, config, self.longest = model, model.config, longest
        asked = resolve(dict(apply))
        like = next(model.parameters())
        self.device = like.device
        demand = demand_of(
            config, model.method.to_dict(), asked.to_dict(),
            itemsize=like.element_size(), block_size=BLOCK, in_flight=LIMIT,
        )  # fmt: skip
        assert isinstance(demand, Slots)
        self.demand = demand
        method = under(model.method.to_dict(), asked.to_dict())
        slots = method["eviction"].value.load()(method["eviction"].params).in_slots()
        blocks = 1000
        self.pool = torch.full(
            (blocks * BLOCK, demand.width), float("nan"), dtype=like.dtype, device=like.device
        )
        self.cache = slots.ranking.pooled()(
            demand.config, method, slots, self.pool, demand.space(), model.rotation
        )
        self.free = torch.randperm(
            blocks - 1, generator=torch.Generator().manual_seed(3)
        ).add(1).tolist()  # fmt: skip
        self.blocks: dict[str, list[int]] = {}
        self.seen: dict[str, int] = {}

    def step(self, new: Mapping[str, list[int]], going: Mapping[str, int]) -> dict[str, Tensor]:
        """Run whole prompts and one more token each of others; return the logits of each."""
        for name, prompt in new.items():
            count = self.demand.blocks(len(prompt), self.longest)
            assert count <= len(self.free)
            self.blocks[name], self.free = self.free[:count], self.free[count:]
            self.seen[name] = 0
        ids, positions, ends, prompts, rows = [], [], {}, [], []
        for name in (*new, *going):
            came = new[name] if name in new else [going[name]]
            begun = len(ids)
            ids += came
            positions += range(self.seen[name], self.seen[name] + len(came))
            self.seen[name] += len(came)
            ends[name] = len(ids) - 1
            if name in new:
                prompts.append(slice(begun, len(ids)))
            else:
                rows.append(begun)
        batch = Batch(
            tuple(prompts), torch.tensor(rows, dtype=torch.long, device=self.device),
            torch.tensor([self.longest] * len(new), device=self.device), self.table(new),
            self.table(going), max(self.seen.values()),
        )  # fmt: skip
        given = [torch.tensor(numbers, device=self.device) for numbers in (ids, positions)]
        self.counting = Counting()
        with torch.inference_mode(), self.counting:
            self.cache.begin(batch)
            out = self.model.serve(given[0], given[1], self.cache)
            logits = self.model.head_of(out)
        return {name: logits[row] for name, row in ends.items()}

    def table(self, names: Any) -> Tensor:
        longest = max(len(blocks) for blocks in self.blocks.values())
        rows = [self.blocks[n] + [7] * (longest - len(self.blocks[n])) for n in names]
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), longest)

    def end(self, name: str) -> None:
        self.free = self.blocks.pop(name) + self.free
        del self.seen[name]


def model_of(method: Method, **sizes: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = DecoderConfig(VOCABULARY, **{**llama(32, 3, 4, 2, 48), **sizes})
    return build(config, method).double().eval()


def played(
    model: LanguageModel,
    apply: dict[str, Any],
    longest: int = LIMIT,
    *,
    served: LanguageModel | None = None,
    close: float = 1e-6,
    steps: int = 18,
) -> Engine:
    """Requests come, go and are of all lengths; each gives what it gives by itself.

    Args: served: the engine's copy of the model, where it has one of its own.
    """
    engine = Engine(served or model, apply, longest)
    draw = torch.Generator().manual_seed(1)
    lengths = {"a": 23, "b": 9, "c": 15, "d": 1, "e": 30}
    prompts = {
        name: torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        for name, length in lengths.items()
    }
    comes = {0: ["a", "b"], 3: ["c"], 5: ["d"], 11: ["e"]}
    goes = {8: ["b"], 10: ["a"]}
    sessions: dict[str, Any] = {}
    following: dict[str, int] = {}
    for number in range(steps):
        for name in goes.get(number, []):
            engine.end(name)
            del following[name], sessions[name]
        new = {name: prompts[name] for name in comes.get(number, [])}
        found = engine.step(new, following)
        for name, logits in found.items():
            if name in new:
                ids = torch.tensor([prompts[name]])
                asked = resolve(apply)
                after = longest - len(prompts[name])
                sessions[name] = model.start(ids, new_tokens=after, apply=asked)
                wanted = sessions[name].logits
            else:
                wanted = sessions[name].step(torch.tensor([following[name]]))
            torch.testing.assert_close(
                logits.cpu(), wanted[0], atol=close, rtol=0, msg=f"{name} {number}"
            )
            following[name] = int(wanted[0].argmax())
    return engine


@pytest.mark.parametrize("name", METHODS)
def test_requests_are_what_they_are_alone(name: str) -> None:
    played(model_of(resolve({})), METHODS[name])


@pytest.mark.parametrize("name", [*METHODS, *ADORE])
def test_rows_are_read_where_they_lie(
    controllers: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where attention takes the pool and the numbers of rows; see `Stored.table`."""
    for module in (pool, rope):
        monkeypatch.setattr(module, "fused", lambda x: True)
    apply = METHODS.get(name) or {
        "adore": adore(controllers, ADORE[name]), "uniform": {"tokens": 6}
    }  # fmt: skip
    played(model_of(resolve({})), apply)


def adore(controllers: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the controller that they need."""
    if settings.get("scores") == "rule":
        return settings
    return {"controller": str(controllers / settings.get("per", "model")), **settings}


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@pytest.mark.parametrize("budget", ["uniform", "squeeze_attention", "pyramidkv"])
def test_what_outgrows_a_request_takes_no_room(name: str, budget: str) -> None:
    """Budgets above what a request can ever have, or in some layers alone, end with it."""
    for tokens, longest in ((400, 48), (40, 48)):
        apply = {name: METHODS[name][name], budget: {"tokens": tokens}}
        engine = played(model_of(resolve({})), apply, longest)
        assert engine.demand.blocks(20, longest) <= -(-3 * (longest + 1) // BLOCK)


def test_a_request_shorter_than_the_least_budget() -> None:
    engine = Engine(model_of(resolve({})), METHODS["streaming_llm"], longest=3)
    engine.step({"a": [5]}, {})
    engine.step({}, {"a": 7})


@pytest.mark.parametrize(
    "budget",
    [{"uniform": {"tokens": 6}}, {"per_layer": {"tokens": [9, 5, 7]}},
     {"squeeze_attention": {"tokens": 8}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ADORE)
def test_logs_of_all_tokens(controllers: Path, name: str, budget: dict[str, Any]) -> None:
    played(model_of(resolve({})), {"adore": adore(controllers, ADORE[name]), **budget})


@pytest.mark.parametrize("name", ["plain", "per_layer_rule"])
def test_logs_where_layers_share_or_have_windows(controllers: Path, name: str) -> None:
    apply = {"adore": adore(controllers, ADORE[name]), "uniform": {"tokens": 6}}
    played(model_of(resolve({}), windows=(5, None, 9)), apply)
    played(model_of(resolve({"cla": {}}), layers=6), apply)


@pytest.mark.parametrize("name", ["sliding_window", "h2o", "snapkv", "squeeze"])
def test_layers_that_share_downwards(name: str) -> None:
    sharing = resolve({"cla": {}})
    apply = METHODS[name]
    played(model_of(sharing), apply)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming_absolute"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_windows_of_the_model_and_other_heads(name: str, kv_heads: int) -> None:
    played(model_of(resolve({}), windows=(5, None, 9), kv_heads=kv_heads), METHODS[name])


@pytest.mark.parametrize("name", ["h2o", "streaming_absolute", "sliding_window"])
def test_windows_of_the_model_ask_for_no_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel can answer is asked of one."""
    monkeypatch.delattr("kvlab.methods.cache.ranking.ranked")
    played(model_of(resolve({}), windows=(5, None, 9)), METHODS[name])


@pytest.mark.parametrize(
    "apply",
    [{}, {"h2o": {}, "uniform": {"tokens": 3}}, {"sliding_window": {}, "uniform": {"tokens": 2}},
     {"snapkv": {"window": 2}, "uniform": {"tokens": 3}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("prefix", [1, 2])
def test_blocks(apply: dict[str, Any], prefix: int) -> None:
    method = resolve({"block_transformer": {"block_length": 4, "prefix_length": prefix}})
    played(model_of(method, layers=4), apply)


@pytest.mark.parametrize("name", [*METHODS, *ADORE, "blocks"])
def test_a_step_takes_as_many_operations_for_64_requests_as_for_4(
    controllers: Path, name: str
) -> None:
    blocks = name == "blocks"
    method = resolve({"block_transformer": {"block_length": 4}} if blocks else {})
    model = model_of(method, layers=4 if blocks else 3)
    apply = METHODS.get(name, {})
    if name in ADORE:
        apply = {"adore": adore(controllers, ADORE[name]), "uniform": {"tokens": 6}}
    engine = Engine(model, apply, longest=14)
    draw = torch.Generator().manual_seed(0)
    every = [f"r{i}" for i in range(64)]
    for name_ in every:
        engine.step({name_: torch.randint(1, VOCABULARY, (9,), generator=draw).tolist()}, {})
    engine.step({}, dict.fromkeys(every, 5))  # where only every second step rebuilds
    counts = []
    for some in (every[:4], every):
        engine.step({}, dict.fromkeys(some, 5))
        counts.append(engine.counting.operations)
    assert counts[0] == counts[1]
