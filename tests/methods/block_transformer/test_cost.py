"""The cost model against the paper's parameter table, real models, torch's counter and caches."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvlab.methods.axis import Method
from kvlab.methods.block_transformer.cost import BlockCost
from kvlab.methods.build import build
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig, gpt_neox, llama
from kvlab.methods.registry import resolve

KINDS = list(
    itertools.product(
        ["lookup", "projection", "encoder", "cls"], ["prefix", "summation", "cross_attention"]
    )
)
FAMILIES = {
    "neox": DecoderConfig(vocab_size=64, **gpt_neox(128, 4, 4)),
    "llama": DecoderConfig(vocab_size=64, **llama(128, 4, 4, 2, 352, tie_embeddings=True)),
}


def block(**params: object) -> Method:
    return resolve({"block_transformer": params})


# Fact 1.6: width, layers, heads -> body of both, expansion, the three tables, total; millions.
TABLE = {
    "5M": (256, 6, 8, 2.37, 0.13, (3.2, 12.9, 12.9), 33.8),
    "19M": (512, 6, 8, 9.46, 0.53, (6.4, 25.8, 25.8), 77.4),
    "85M": (768, 12, 12, 42.5, 1.18, (9.7, 38.6, 38.6), 173.2),
    "302M": (1024, 24, 16, 151, 2.10, (12.9, 51.5, 51.5), 420.3),
    "805M": (2048, 16, 16, 403, 8.39, (25.8, 103, 103), 1045.9),
    "1.2B": (2048, 24, 16, 604, 8.39, (25.8, 103, 103), 1448.8),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters_of_the_paper(name: str) -> None:
    width, layers, heads, body, expansion, tables, total = TABLE[name]
    config = DecoderConfig(vocab_size=50304, **gpt_neox(width, layers, heads))
    cost = cost_of(config, block(block_length=4))
    assert isinstance(cost, BlockCost)
    for decoder in (cost.block, cost.token):
        assert decoder.body_parameters() / 1e6 == pytest.approx(body, rel=2e-3)
        assert decoder.body_parameters() == layers // 2 * (12 * width**2 + 13 * width) + 2 * width
    found = (cost.body_parameters() - 2 * cost.block.body_parameters()) / 1e6
    assert found == pytest.approx(expansion, abs=5e-3)
    assert (cost.total_parameters() - cost.body_parameters()) / 1e6 == pytest.approx(
        sum(tables), rel=3e-3
    )
    assert cost.total_parameters() / 1e6 == pytest.approx(total, abs=0.06)


def test_bodies_are_equal_but_for_expansion_and_one_norm() -> None:
    """By default the layers of the config are divided: nothing but what joins them is added."""
    config = FAMILIES["llama"]
    divided, whole = cost_of(config, block(block_length=4)), cost_of(config, resolve({}))
    expansion = 128 * 256 + 256
    assert divided.body_parameters() - whole.body_parameters() == expansion + 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("embedder", "decoder"), KINDS)
def test_parameters_of_real_models(family: str, embedder: str, decoder: str) -> None:
    method = block(embedder=embedder, token_decoder=decoder, encoder_width=64)
    model, cost = build(FAMILIES[family], method), cost_of(FAMILIES[family], method)
    assert cost.body_parameters() == model.body_parameters()
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "params",
    [
        {"layers": "skip"},
        {"layers": "duplicate"},
        {"ratio": 3.0},
        {"block_layers": 5, "token_layers": 4, "token_width": 64, "token_decoder": "summation"},
        {"token_width": 64, "token_heads": 4},
        {"expansion": "repeat"},
        {"embedder": "projection", "embedding_width": 48},
    ],
)
def test_parameters_of_other_sizes(params: dict[str, object]) -> None:
    method = block(block_length=4, **params)
    config = FAMILIES["llama"]
    model, cost = build(config, method), cost_of(config, method)
    assert cost.body_parameters() == model.body_parameters()
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("embedder", "decoder"), KINDS)
def test_flops_against_torch(embedder: str, decoder: str) -> None:
    method = block(block_length=4, embedder=embedder, token_decoder=decoder, encoder_width=64)
    config = FAMILIES["neox"]
    model, cost = build(config, method), cost_of(config, method)
    ids = torch.randint(64, (2, 64))
    with FlopCounterMode(display=False) as training:
        score = model(ids)
        score.nll[score.scored].mean().backward()
    assert cost.train_flops_per_token(64) * ids.numel() == pytest.approx(
        training.get_total_flops(), rel=0.05
    )
    with FlopCounterMode(display=False) as prefill:
        session = model.start(ids, new_tokens=8)
    assert 2 * cost.prefill_flops(64) == pytest.approx(prefill.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as decoding:
        for _ in range(8):
            session.step(ids[:, 0])
    assert 16 * cost.decode_flops(70) == pytest.approx(decoding.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("decoder", ["prefix", "summation", "cross_attention"])
@pytest.mark.parametrize(("prompt", "new"), [(10, 22), (64, 64), (1, 127)])
@pytest.mark.parametrize("window", [None, 8])
def test_kv_bytes_against_the_live_cache(
    decoder: str, prompt: int, new: int, window: int | None
) -> None:
    method = block(block_length=4, token_decoder=decoder)
    apply = resolve("full_attention" if window is None else {"sliding_window": {"window": window}})
    both = Method("both", {**method.choices, "eviction": apply["eviction"]})
    model = build(FAMILIES["llama"], method)
    session = model.start(torch.randint(64, (3, prompt)), new_tokens=new, apply=apply)
    for _ in range(new):
        session.step(torch.randint(64, (3,)))
    predicted = 3 * cost_of(FAMILIES["llama"], both).kv_bytes(prompt + new, 4)
    assert session.kv_bytes() == pytest.approx(predicted, rel=0.02)
    assert session.kv_tokens() == 3 * (prompt + new)


def test_what_a_token_reads_is_less_than_a_decoder_reads() -> None:
    """Fact 4.2: block decoder 1 / L_B^2, token decoder at most p + L_B - 1 rows."""
    config = DecoderConfig(vocab_size=50304, **gpt_neox(2048, 24, 16))
    cost = cost_of(config, block(block_length=4))
    at_most = 4 * 12 * 2048 * (2176 / 16 + 5)
    at_least = 4 * 12 * 2048 * (2176 / 16 + 2)
    assert at_least < cost.kv_bytes_read_per_token(2176, 2) < at_most
    assert cost.kv_bytes(2176, 2) / 2**20 == pytest.approx(51 + 0.5, rel=0.01)
    assert cost.first_target() == 4


SHARED = {
    "own": {},
    "bottom": {"cross_layer": {"layout": "pizza_bottom", "kv_layers": 2}},
    "top": {"cross_layer": {"layout": "sandwich_top", "kv_layers": 3}},
    "gqa": {"gqa": {"kv_heads": 1}},
}


def shared(name: str, prefill: dict[str, object] | None = None) -> Method:
    split = {"block_length": 4, "block_layers": 5, "token_layers": 1}
    return resolve(
        {"block_transformer": split, **SHARED[name], **({"prefill": prefill} if prefill else {})}
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHARED)
def test_parameters_of_a_shared_block_decoder(family: str, name: str) -> None:
    """Only the block decoder shares; its sizes are not cut into blocks a second time."""
    config = FAMILIES[family].with_(layers=6)
    model, cost = build(config, shared(name)), cost_of(config, shared(name))
    assert cost.body_parameters() == model.body_parameters()
    assert cost.total_parameters() == sum(p.numel() for p in model.parameters())


def test_bytes_of_a_shared_block_decoder_by_hand() -> None:
    config = FAMILIES["llama"].with_(layers=6)
    own, bottom = (cost_of(config, shared(name)) for name in ("own", "bottom"))
    row = 2 * 2 * 32 * 2
    assert own.kv_bytes(64, 2) == 5 * 16 * row + 5 * row
    assert bottom.kv_bytes(64, 2) == 2 * 16 * row + 5 * row
    assert bottom.kv_bytes_read_per_token(64, 2) == own.kv_bytes_read_per_token(64, 2)


@pytest.mark.parametrize("prefill", [None, {"early_exit": False}, {"passes": 3}], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_flops_of_a_shared_block_decoder_against_torch(
    name: str, prefill: dict[str, object] | None
) -> None:
    config, method = FAMILIES["llama"].with_(layers=6), shared(name, prefill)
    model, cost = build(config, shared(name)), cost_of(config, method)
    ids = torch.randint(64, (1, 64))
    with FlopCounterMode(display=False) as prefilling:
        session = model.start(ids, new_tokens=8, apply=method)
    assert cost.prefill_flops(64) == pytest.approx(prefilling.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as decoding:
        for _ in range(8):
            session.step(ids[:, 0])
    assert 8 * cost.decode_flops(70) == pytest.approx(decoding.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as scoring, torch.no_grad():
        model(ids, apply=method)
    assert 64 * cost.score_flops_per_token(64) == pytest.approx(scoring.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as training:
        model(ids).nll.sum().backward()
    assert 64 * cost.train_flops_per_token(64) == pytest.approx(
        training.get_total_flops(), rel=0.05
    )
