"""Predicted rows, bytes and FLOPs under budgets: by hand, against live caches, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import fixed
from kvlab.methods.cache.opening import open_cache, scores_in_one_pass
from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import DecoderConfig, Sharing, llama
from kvlab.methods.decoder.cost import DecoderCost, causal_pairs
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import REGISTRY, resolve

EVICTIONS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": {}},
    "sinks": {"streaming_llm": {}},
    "sinks, all kept": {"streaming_llm": {"generated": "keep", "positions": "absolute"}},
    "turns": {"streaming_llm": {"turns": True}},
    "h2o": {"h2o": {}},
    "h2o, all kept": {"h2o": {"generated": "keep"}},
    "snapkv": {"snapkv": {"window": 8}},
    "snapkv by query head": {"snapkv": {"window": 8, "heads": "query"}},
    "observed": {"observed_attention": {}},
}
BUDGETS: dict[str, dict[str, Any]] = {
    "share": {"uniform": {"share": 0.25}},
    "tokens": {"uniform": {"tokens": 48}},
    "squeeze": {"squeeze_attention": {"share": 0.25}},
    "pyramid": {"pyramidkv": {"share": 0.25, "beta": 4}},
    "paper": {"pyramidkv": {"share": 0.25, "beta": 4, "rule": "paper"}},
    "kvpress": {"pyramidkv": {"share": 0.25, "beta": 4, "rule": "kvpress"}},
    "list": {"per_layer": {"tokens": [60, 50, 40, 30]}},
}
PROMPT, NEW = 160, 12
CONFIG = DecoderConfig(vocab_size=53, **{**llama(64, 4, 4, 2, 96), "head_dim": 64}, init_std=0.2)


@pytest.fixture(scope="module")
def model() -> TokenModel:
    torch.manual_seed(0)
    return TokenModel(CONFIG, resolve({})).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(53, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(2))


def counted(run: Callable[[], object]) -> int:
    """FLOPs that torch counts; its counter does not know the fused attention of CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def decoder_cost(method: Method, config: DecoderConfig = CONFIG) -> DecoderCost:
    cost: Cost = cost_of(config, method)
    assert isinstance(cost, DecoderCost)
    return cost


def test_rows_by_hand() -> None:
    listed = {"per_layer": {"tokens": [6, 5, 4, 3]}}
    evicting, growing = ({"h2o": {"generated": how}, **listed} for how in ("evict", "keep"))
    assert decoder_cost(resolve(evicting)).rows(20, 10) == {0: 7, 1: 6, 2: 5, 3: 4}
    assert decoder_cost(resolve(evicting)).rows(5, 2) == {0: 5, 1: 5, 2: 5, 3: 4}
    assert decoder_cost(resolve(growing)).rows(20, 10) == {0: 16, 1: 15, 2: 14, 3: 13}
    assert decoder_cost(resolve(growing)).rows(5, 2) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_a_share_is_of_the_prompt_alone() -> None:
    cost = decoder_cost(resolve({"sliding_window": {}, "uniform": {"share": 0.25}}))
    assert cost.rows(400, 100) == dict.fromkeys(range(4), 26)
    assert cost.rows(400) == dict.fromkeys(range(4), 101)
    assert cost.kv_bytes(400, 2, 100) == 4 * 26 * 2 * 2 * 64 * 2
    assert cost.kv_bytes_per_token(400, 2, 100) == cost.kv_bytes(400, 2, 100) / 400
    assert cost.kv_bytes_read_per_token(400, 2, 100) == cost.kv_bytes(400, 2, 100)


def test_a_list_counts_the_layers_that_own_keys() -> None:
    config = CONFIG.with_(sharing=Sharing((0, 2, 2, 2)))
    method = resolve({"sliding_window": {}, "per_layer": {"tokens": [9, 4]}})
    assert decoder_cost(method, config).rows(50) == {0: 10, 2: 5}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_bytes_against_the_live_cache(
    model: TokenModel, text: Tensor, eviction: str, budget: str
) -> None:
    method = resolve({**EVICTIONS[eviction], **BUDGETS[budget]})
    with torch.inference_mode():
        session = model.start(text[:, :PROMPT], new_tokens=NEW, apply=method)
        for place in range(PROMPT, PROMPT + NEW):
            session.step(text[:, place])
    predicted = cost_of(CONFIG, method).kv_bytes(PROMPT + NEW, 4, PROMPT)
    assert session.kv_bytes() == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("budget", ["share", "squeeze", "pyramid", "list"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_decode_flops_against_torch(
    model: TokenModel, text: Tensor, eviction: str, budget: str
) -> None:
    method = resolve({**EVICTIONS[eviction], **BUDGETS[budget]})
    with torch.inference_mode():
        session = model.start(text[:, :PROMPT], new_tokens=2, apply=method)
        session.step(text[:, PROMPT])
        found = counted(lambda: session.step(text[:, PROMPT + 1]))
    assert cost_of(CONFIG, method).decode_flops(PROMPT + 2, PROMPT) == pytest.approx(
        found, rel=0.002
    )


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_prefill_flops_are_those_counted_less_the_masked_half(
    model: TokenModel, text: Tensor, eviction: str
) -> None:
    method = resolve({**EVICTIONS[eviction], **BUDGETS["share"]})
    cost, prompt = decoder_cost(method), text[:, :PROMPT]
    with torch.inference_mode():
        found = counted(lambda: model.start(prompt, new_tokens=0, apply=method))
    masked = 4 * cost.attention_flops(PROMPT * PROMPT - causal_pairs(PROMPT, None))
    if "snapkv" in eviction:  # the window's own scores, worked out a second time
        masked += 4 * cost.attention_flops(8 * 7 // 2) / 2
        votes = 4 * 2 * 4 * 64 * (8 * PROMPT - 8 * 7 // 2)
        plain = decoder_cost(resolve({"sliding_window": {}})).prefill_flops(PROMPT)
        assert cost.prefill_flops(PROMPT) - plain == votes
    assert found - masked == cost.prefill_flops(PROMPT)


def test_who_sees_every_row_exits_no_layer_early() -> None:
    config = CONFIG.with_(sharing=Sharing((0, 1, 1, 1)))
    early = decoder_cost(resolve({"streaming_llm": {}}), config).prefill_flops(64)
    assert decoder_cost(resolve({"full_attention": {}}), config).prefill_flops(64) == early
    for written in ({"h2o": {}}, {"streaming_llm": {}, "squeeze_attention": {}}):
        assert decoder_cost(resolve(written), config).prefill_flops(64) > early


def combinations() -> list[dict[str, Any]]:
    """Every eviction alone, and with every other value of the axes that it reads."""
    found: list[dict[str, Any]] = [{"sliding_window": {"window": 9}}]
    small: dict[str, Any] = {"snapkv": {"window": 4}, "adore": {"scores": "rule"}}
    for value in REGISTRY.values("eviction"):
        own = {value.name: small.get(value.name, {})}
        found.append(own)
        for axis in value.consumes:
            for other in REGISTRY.values(axis):
                if other.name == "global_topk" and not value.scores:
                    continue
                given = {"tokens": [9, 9, 9, 9]} if other.name == "per_layer" else {}
                found.append({**own, other.name: given})
    found.append({"streaming_llm": {"positions": "absolute"}})
    found.append({"streaming_llm": {"positions": "absolute", "turns": True}})
    return found


@pytest.mark.parametrize("written", combinations(), ids=str)
def test_the_cost_model_knows_what_the_cache_does(written: dict[str, Any]) -> None:
    """Whether one pass scores, and whether every row of every layer is looked at."""
    for method in (resolve(written), fixed(resolve(written), 64)):
        assert decoder_cost(method).in_one_pass() == scores_in_one_pass(CONFIG, method)
    method = resolve(written)
    cache = open_cache(
        CONFIG, method, batch=1, tokens=8, device=torch.device("cpu"), dtype=torch.float32
    )
    flagged = any(choice.value.observes_all for choice in method.choices.values())
    assert cache.observes_all == flagged


def test_scoring_in_one_pass_reads_what_the_budget_leaves() -> None:
    """A share is of the sequence: 16 of 64 rows, so that a query reads 17."""
    budget = {"uniform": {"share": 0.25}}
    for eviction in ({"sliding_window": {}}, {"streaming_llm": {"positions": "absolute"}}):
        found = decoder_cost(resolve({**eviction, **budget}))
        through = decoder_cost(resolve({"sliding_window": {"window": 17}}))
        assert found.score_flops_per_token(64) == through.score_flops_per_token(64)
        assert found.score_steps(64) == 1


@pytest.mark.parametrize("length", [64, 1000])
def test_scoring_token_by_token_is_decoding(length: int) -> None:
    method = resolve({"h2o": {}, "uniform": {"share": 0.25}})
    cost, under = decoder_cost(method), decoder_cost(fixed(method, length))
    steps = [under.decode_flops(context, 1) for context in range(1, length + 1)]
    assert cost.score_flops_per_token(length) == pytest.approx(sum(steps) / length, rel=0.001)
    assert cost.score_steps(length) == length


def test_blocks_are_counted_in_blocks() -> None:
    block = {"block_transformer": {"block_length": 4}}
    method = resolve({**block, "sliding_window": {}, "uniform": {"tokens": 10}})
    shared = resolve({**block, "sliding_window": {}, "uniform": {"share": 0.25}})
    cost, alike = cost_of(CONFIG, method), cost_of(CONFIG, shared)
    assert alike.kv_bytes(400, 4, 160) == cost.kv_bytes(400, 4)  # 40 blocks of prompt
    more = cost_of(CONFIG, resolve({**block, "sliding_window": {}, "uniform": {"tokens": 11}}))
    layers = method.acting(CONFIG).layers
    assert more.kv_bytes(400, 4) - cost.kv_bytes(400, 4) == layers * 2 * 2 * 64 * 4
    assert alike.decode_flops(400, 160) == cost.decode_flops(400)
    assert alike.kv_bytes_read_per_token(400, 4, 160) == cost.kv_bytes_read_per_token(400, 4)
