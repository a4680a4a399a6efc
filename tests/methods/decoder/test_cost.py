"""Predicted cost against built models: parameters, counted FLOPs, live storages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvlab.methods.cost import Cost, cost_of
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.decoder.cost import DecoderCost, causal_pairs
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import resolve

FULL = resolve("full_attention")
WINDOW = resolve({"sliding_window": {"window": 5}})


def decoder_cost(config: DecoderConfig) -> DecoderCost:
    cost: Cost = cost_of(config, FULL)
    assert isinstance(cost, DecoderCost)
    return cost


def counted(run: Callable[[], object]) -> int:
    """FLOPs that torch counts; its counter does not know the fused attention of CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_parameters(model: TokenModel) -> None:
    cost = cost_of(model.config, FULL)
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())
    assert cost.body_parameters() == model.body_parameters()


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_presets(preset: str) -> None:
    config = DecoderConfig(vocab_size=128, **PRESETS[preset])
    with torch.device("meta"):
        model = TokenModel(config, FULL)
    assert cost_of(config, FULL).total_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{"out_bias": True, "mlp_bias": True}, {"gated": False, "norm": "layer"}], ids=str
)
def test_parameters_of_any_choice(
    tiny: Callable[..., TokenModel], changes: dict[str, object]
) -> None:
    model = tiny("qwen3", **changes)
    cost = cost_of(model.config, FULL)
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())


def test_a_decoder_without_tables(tiny: Callable[..., TokenModel]) -> None:
    config = tiny("neox").config
    part = Decoder(config, embeddings=False, head=False)
    cost = DecoderCost(config, FULL, tables=False)
    assert cost.total_parameters() == sum(p.numel() for p in part.parameters())
    assert cost.head_flops() == 0


@pytest.mark.parametrize("method", [FULL, WINDOW], ids=["full", "window"])
def test_decode_flops_are_those_counted(
    model: TokenModel, ids: Callable[..., Tensor], method: object
) -> None:
    session = model.start(ids(1, 7), new_tokens=2, apply=method)  # type: ignore[arg-type]
    cost = cost_of(model.config, method)  # type: ignore[arg-type]
    for context in (8, 9):
        assert counted(lambda: session.step(torch.tensor([1]))) == cost.decode_flops(context)


def test_prefill_flops_are_those_counted_less_the_masked_half(
    model: TokenModel, ids: Callable[..., Tensor]
) -> None:
    prompt = ids(1, 8)
    found = counted(lambda: model.start(prompt, new_tokens=0))
    cost = decoder_cost(model.config)
    windows = model.config.windows or (None,) * model.config.layers
    masked = sum(8 * 8 - causal_pairs(8, window) for window in windows)
    assert found - cost.attention_flops(masked) == cost.prefill_flops(8)


def test_training_is_three_forward_passes(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    model, text = tiny("llama"), ids(1, 9)
    cost = decoder_cost(model.config)
    found = counted(lambda: model(text).nll.sum().backward())
    unscored = 3 * cost.head_flops()  # the last row has no target
    masked = 3 * model.config.layers * cost.attention_flops(9 * 9 - causal_pairs(9, None))
    assert found + unscored - masked == pytest.approx(9 * cost.train_flops_per_token(9))


@pytest.mark.parametrize("method", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("preset", ["nano", "pythia-5m"])
def test_bytes_kept_are_those_measured(preset: str, method: object) -> None:
    config = DecoderConfig(vocab_size=64, **PRESETS[preset])
    model = TokenModel(config, FULL)
    session = model.start(torch.ones(3, 20, dtype=torch.long), new_tokens=4, apply=method)  # type: ignore[arg-type]
    for _ in range(4):
        session.step(torch.ones(3, dtype=torch.long))
    predicted = cost_of(config, method).kv_bytes(24, 4)  # type: ignore[arg-type]
    assert session.kv_bytes() == pytest.approx(3 * predicted, rel=0.02)
    assert session.kv_tokens() == 72


def test_bytes_of_windows(tiny: Callable[..., TokenModel]) -> None:
    config = tiny("mistral").config  # windows 5, none, 5
    row = 2 * config.kv_heads * config.head_dim
    assert cost_of(config, FULL).kv_bytes(20, 2) == 2 * row * (5 + 20 + 5)
    assert cost_of(config, WINDOW).kv_bytes(20, 2) == 2 * row * (5 + 5 + 5)
    assert cost_of(config, FULL).kv_bytes_per_token(20, 2) == 2 * row * 30 / 20
    assert cost_of(config, FULL).kv_bytes_read_per_token(20, 2) == 2 * row * 30
    assert cost_of(config, FULL).first_target() == 1


def test_pairs_of_a_causal_pass() -> None:
    for tokens in range(1, 9):
        for window in (None, 1, 3, 20):
            pairs = sum(min(t + 1, window or t + 1) for t in range(tokens))
            assert causal_pairs(tokens, window) == pairs
