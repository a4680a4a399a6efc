"""Predicted cost of layers that share keys and values: by hand, and against what torch counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvlab.methods.axis import Method
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig, Sharing, gpt_neox, llama
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

FULL = resolve("full_attention")
MASKED = 0.02
"""Share of the FLOPs counted by torch that masked keys may take: 24 rows at width 128."""
MAPS: dict[str, tuple[int, ...]] = {
    "own": (0, 1, 2, 3, 4, 5),
    "pizza-bottom": (0, 1, 2, 2, 2, 2),
    "sandwich-top": (0, 4, 4, 4, 4, 5),
    "sandwich-middle": (0, 2, 2, 2, 2, 5),
    "lasagna-top": (2, 2, 2, 5, 5, 5),
    "nested": (1, 3, 2, 3, 4, 4),
    "unread": (1, 1, 1, 4, 4, 1),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": llama(128, 6, 4, 2, 352),
    "tied": llama(128, 6, 4, 1, 352, tie_embeddings=True),
    "qwen3": llama(128, 6, 4, 2, 352, qk_norm=True, qkv_bias=True),
    "neox": gpt_neox(128, 6, 4),
}


def shared(kv_of: tuple[int, ...], family: str = "llama", **sharing: Any) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=53, **FAMILIES[family], sharing=Sharing(kv_of, **sharing), init_std=0.2
    )


def small(*kv_of: int, **sharing: Any) -> DecoderConfig:
    """K/V maps of 64 weights, all else of a layer 512; a (query, key) pair is 32 FLOPs."""
    sizes = llama(8, len(kv_of), 2, 1, 16)
    return DecoderConfig(vocab_size=10, **sizes, sharing=Sharing(kv_of, **sharing))


def counted(run: Callable[[], object]) -> int:
    """FLOPs that torch counts; its counter does not know the fused attention of CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def prefill(**params: object) -> Method:
    return resolve({"prefill": params})


@pytest.fixture
def text() -> Tensor:
    return torch.randint(53, (1, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MAPS)
def test_layers_that_no_layer_reads_own_no_keys_and_values(family: str, name: str) -> None:
    config = shared(MAPS[name], family)
    with torch.device("meta"):
        model = TokenModel(config, FULL)
    cost = cost_of(config, FULL)
    assert cost.body_parameters() == model.body_parameters()
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())
    own = cost_of(config.with_(sharing=None), FULL).body_parameters()
    per_layer = 2 * config.kv_heads * config.head_dim * (config.width + config.qkv_bias)
    per_layer += config.head_dim * config.qk_norm
    assert own - cost.body_parameters() == (6 - len(config.kv_layers)) * per_layer


def test_bytes_by_hand() -> None:
    cost = cost_of(small(0, 1, 1, 1), FULL)
    assert cost.kv_bytes(10, 2) == 2 * 10 * 2 * 4 * 2
    assert cost.kv_bytes_read_per_token(10, 2) == 4 * 10 * 2 * 4 * 2  # sharing reads no less
    upward = cost_of(small(0, 3, 3, 3), FULL)
    assert upward.kv_bytes(10, 2) == 2 * 10 * 2 * 4 * 2
    assert upward.kv_bytes_read_per_token(10, 2) == (10 + 9 + 9 + 10) * 2 * 4 * 2
    strict = cost_of(small(0, 3, 3, 3, strict=True), FULL)
    assert strict.kv_bytes_read_per_token(10, 2) == 4 * 9 * 2 * 4 * 2


def test_a_kv_layer_keeps_what_its_farthest_reader_reads() -> None:
    config = small(0, 1, 1, 1).with_(windows=(4, 4, 6, 4))
    cost = cost_of(config, FULL)
    assert cost.kv_bytes(10, 1) == (4 + 6) * 8
    assert cost.kv_bytes_read_per_token(10, 1) == (4 + 4 + 6 + 4) * 8
    narrow = cost_of(config, resolve({"sliding_window": {"window": 5}}))
    assert narrow.kv_bytes(10, 1) == (4 + 5) * 8


def test_prefill_by_hand() -> None:
    config, head = small(0, 1, 1, 1), 2 * 8 * 10
    first, last = 2 * 10 * 576 + 32 * 55, 2 * 512 + 32 * 10
    whole = 2 * first + 2 * (2 * 10 * 512 + 32 * 55) + head
    early = first + (2 * 10 * 64 + last) + 2 * last + head
    assert cost_of(config, FULL).prefill_flops(10) == early
    assert cost_of(config, prefill(early_exit=True)).prefill_flops(10) == early
    assert cost_of(config, prefill(early_exit=False)).prefill_flops(10) == whole


def test_early_exit_of_the_last_layer_is_not_automatic() -> None:
    config, head = small(0, 1), 2 * 8 * 10
    layer = 2 * 10 * 576 + 32 * 55
    assert cost_of(config, FULL).prefill_flops(10) == 2 * layer + head
    early = layer + 2 * 10 * 64 + 2 * 512 + 32 * 10 + head
    assert cost_of(config, prefill(early_exit=True)).prefill_flops(10) == early


def test_passes_by_hand() -> None:
    """Layers 1 and 2 are run in m + b = 3 passes; of layer 2 the first two want K/V alone."""
    config, head = small(0, 2, 2, 3, forward_passes=2, backward_passes=1), 2 * 8 * 10
    once = 2 * 10 * 576 + 32 * 55
    below = 3 * 2 * 10 * 512 + 2 * 32 * 45
    top = 2 * 2 * 10 * 64 + once
    forward = 2 * once + below + top + 10 * head
    cost = cost_of(config, FULL)
    assert cost.prefill_flops(10) == forward - 9 * head
    assert 10 * cost.score_flops_per_token(10) == pytest.approx(forward)
    backward = 2 * (3 * once + 2 * 10 * 512 + 32 * 45 + 10 * head)
    assert 10 * cost.train_flops_per_token(10) == pytest.approx(forward + backward)
    one = cost_of(config, prefill(passes=1))
    assert one.prefill_flops(10) == 3 * once + 2 * 10 * 512 + head
    assert 10 * one.score_flops_per_token(10) == pytest.approx(one.prefill_flops(10) + 9 * head)


def test_no_more_passes_than_rows() -> None:
    config = small(1, 1, forward_passes=7, backward_passes=2)
    few = small(1, 1, forward_passes=2, backward_passes=2)
    assert cost_of(config, FULL).prefill_flops(4) == cost_of(few, FULL).prefill_flops(4)
    assert cost_of(config, FULL).prefill_flops(5) > cost_of(few, FULL).prefill_flops(5)
    trained = cost_of(config, FULL).train_flops_per_token(4)
    assert trained == cost_of(few, FULL).train_flops_per_token(4)


def test_decode_is_one_pass() -> None:
    cost = cost_of(small(0, 2, 2, 3), FULL)
    assert cost.decode_flops(10) == 2 * (3 * 576 + 512) + 32 * (3 * 10 + 9) + 2 * 8 * 10


def test_sequential_training_is_three_passes_of_decoding() -> None:
    config = small(0, 2, 2, 3, sequential=True)
    cost = cost_of(config, FULL)
    decoded = sum(cost.decode_flops(context) for context in range(1, 11))
    assert 10 * cost.score_flops_per_token(10) == pytest.approx(decoded)
    assert 10 * cost.train_flops_per_token(10) == pytest.approx(3 * decoded)
    heads = 9 * 2 * config.width * config.vocab_size
    assert cost.prefill_flops(10) == pytest.approx(decoded - heads)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "how", [FULL, prefill(early_exit=False), prefill(passes=3)], ids=["auto", "whole", "three"]
)
def test_prefill_against_torch(name: str, how: Method, text: Tensor) -> None:
    model = TokenModel(shared(MAPS[name]), FULL)
    found = counted(lambda: model.start(text, new_tokens=0, apply=how))
    assert cost_of(model.config, how).prefill_flops(24) == pytest.approx(found, rel=MASKED)


@pytest.mark.parametrize("name", ["own", "pizza-bottom"])
def test_forced_early_exit_against_torch(name: str, text: Tensor) -> None:
    model, how = TokenModel(shared(MAPS[name]), FULL), prefill(early_exit=True)
    found = counted(lambda: model.start(text, new_tokens=0, apply=how))
    assert cost_of(model.config, how).prefill_flops(24) == pytest.approx(found, rel=MASKED)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_decode_against_torch(name: str, strict: bool, text: Tensor) -> None:
    model = TokenModel(shared(MAPS[name], strict=strict), FULL)
    session, cost = model.start(text, new_tokens=2), cost_of(model.config, FULL)
    for context in (25, 26):
        found = counted(lambda: session.step(text[:, 0]))
        assert cost.decode_flops(context) == pytest.approx(found, rel=0.002)


@pytest.mark.parametrize("passes", [(7, 2), (0, 3), (30, 1)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_training_and_scoring_against_torch(
    name: str, passes: tuple[int, int], text: Tensor
) -> None:
    forward, backward = passes
    config = shared(MAPS[name], forward_passes=forward, backward_passes=backward)
    model, cost = TokenModel(config, FULL), cost_of(config, FULL)
    trained = counted(lambda: model(text).nll.sum().backward())
    assert 24 * cost.train_flops_per_token(24) == pytest.approx(trained, rel=MASKED)
    with torch.no_grad():
        scored = counted(lambda: model(text))
    assert 24 * cost.score_flops_per_token(24) == pytest.approx(scored, rel=MASKED)


@pytest.mark.parametrize("name", ["pizza-bottom", "sandwich-top"])
def test_sequential_training_against_torch(name: str, text: Tensor) -> None:
    config = shared(MAPS[name], sequential=True)
    model, cost = TokenModel(config, FULL), cost_of(config, FULL)
    trained = counted(lambda: model(text).nll.sum().backward())
    assert 24 * cost.train_flops_per_token(24) == pytest.approx(trained, rel=MASKED)


@pytest.mark.parametrize("name", MAPS)
def test_bytes_against_the_live_cache(name: str) -> None:
    config = shared(MAPS[name]).with_(windows=(None, 9, 9, None, 9, 9))
    model = TokenModel(config, FULL)
    session = model.start(torch.ones(3, 28, dtype=torch.long), new_tokens=4)
    for _ in range(4):
        session.step(torch.ones(3, dtype=torch.long))
    rows = 3 * 8 * 2 * 32  # the table of positions: at most two capacities of 32
    assert 0 <= session.kv_bytes() - 3 * cost_of(config, FULL).kv_bytes(32, 4) <= rows
