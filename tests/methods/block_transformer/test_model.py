"""Scoring: what is predicted, what leaks, what padding changes, and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.block_transformer.model import BlockTransformer, block_positions
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import resolve
from kvlab.methods.store import load

Make = Callable[..., BlockTransformer]
EMBEDDERS = ["lookup", "projection", "encoder", "cls"]
DECODERS = ["prefix", "summation", "cross_attention"]


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 11, 16])
def test_any_length_is_scored_from_the_second_block(
    make: Make, ids: Callable[..., Tensor], tokens: int
) -> None:
    model, row = make(block_length=4), ids(2, 16)
    with torch.no_grad():
        whole, score = model(row), model(row[:, :tokens])
    assert score.nll.shape == score.scored.shape == (2, tokens)
    assert score.nll.dtype == torch.float32
    assert torch.equal(score.scored, (torch.arange(tokens) >= 4).expand(2, -1))
    torch.testing.assert_close(score.nll, whole.nll[:, :tokens], atol=1e-4, rtol=1e-4)
    assert not score.nll[~score.scored].any()


@pytest.mark.parametrize("embedder", EMBEDDERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_no_token_sees_a_later_one(
    make: Make, ids: Callable[..., Tensor], embedder: str, decoder: str
) -> None:
    model, row = make(block_length=4, embedder=embedder, token_decoder=decoder), ids(1, 24)
    with torch.no_grad():
        before = model.logits(row).flatten(1, 2)[0]
        for changed in (4, 7, 9, 14, 23):
            other = row.clone()
            other[0, changed] = 1 + other[0, changed] % 60
            after = model.logits(other).flatten(1, 2)[0]
            moved = (after - before).abs().amax(-1) > 1e-6
            first = int(moved.nonzero()[0]) + 4 if moved.any() else 24
            assert first == changed + 1 or (changed == 23 and first == 24)


def test_loss_is_the_cross_entropy_of_the_predictions(
    make: Make, ids: Callable[..., Tensor]
) -> None:
    model, row = make(block_length=4), ids(2, 13)
    valid = torch.ones_like(row, dtype=torch.bool)
    valid[0, :3], valid[1, 9:] = False, False
    with torch.no_grad():
        score = model(row, valid)
        logits, scored = model.predictions(row, valid)
    assert torch.equal(scored, score.scored)
    expected = torch.nn.functional.cross_entropy(logits[scored], row[scored], reduction="none")
    torch.testing.assert_close(score.nll[scored], expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_is_read_by_nobody(make: Make, ids: Callable[..., Tensor], decoder: str) -> None:
    """Whole blocks of padding in front or behind change nothing; nor does what pads are called."""
    model, row = make(block_length=4, token_decoder=decoder), ids(2, 12)
    wide = torch.cat([ids(2, 8), row, ids(2, 4)], dim=1)
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[:, 8:20] = True
    with torch.no_grad():
        alone, padded = model(row), model(wide, valid)
    torch.testing.assert_close(padded.nll[:, 8:20], alone.nll, atol=1e-4, rtol=1e-4)
    assert torch.equal(padded.scored[:, 8:20], alone.scored)
    assert not padded.scored[~valid].any()


def test_pads_inside_a_block_are_no_keys(make: Make, ids: Callable[..., Tensor]) -> None:
    """A real token after in-block pads is predicted as if the pads' ids were anything."""
    model, row = make(block_length=4), ids(1, 12)
    valid = torch.ones_like(row, dtype=torch.bool)
    valid[:, 4:6] = False
    other = row.clone()
    other[:, 4:6] = 7
    with torch.no_grad():
        one, two = model(row, valid), model(other, valid)
    assert torch.equal(one.nll, two.nll)
    assert one.scored[0].tolist() == [False] * 6 + [True] * 6


def test_positions_count_blocks_that_hold_something() -> None:
    real = torch.zeros(3, 4, 2, dtype=torch.bool)
    real[0, :, 1] = True
    real[1, 2:, 0] = True
    real[2, :2] = True
    assert block_positions(real).tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, -1, -1]]
    assert block_positions(None) is None


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_reach_everything_and_are_finite(
    make: Make, ids: Callable[..., Tensor], decoder: str
) -> None:
    model, row = make(block_length=4, embedder="cls", token_decoder=decoder), ids(2, 24)
    valid = torch.ones_like(row, dtype=torch.bool)
    valid[0, :9], valid[1, 10:] = False, False
    score = model(row, valid)
    score.nll[score.scored].mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "places" in name, name


def test_a_model_of_one_token_blocks_learns(config: DecoderConfig) -> None:
    """L_B = 1: every token but the first is predicted, and training lowers the loss."""
    torch.manual_seed(0)
    method = resolve({"block_transformer": {"block_length": 1, "prefix_length": 1}})
    model = build(config.with_(init_std=0.02), method)
    row = torch.arange(48).remainder(7).view(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        score = model(row)
        assert score.scored[:, 1:].all()
        loss = score.nll[score.scored].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_bodies_match_the_decoder_they_divide(config: DecoderConfig) -> None:
    whole = build(config, resolve({}))
    divided = build(config, resolve({"block_transformer": {"block_length": 4}}))
    assert isinstance(divided, BlockTransformer)
    joins = sum(p.numel() for p in divided.token_decoder.expansion.parameters())
    norm = sum(p.numel() for p in divided.block_decoder.norm.parameters())
    assert divided.body_parameters() == whole.body_parameters() + joins + norm


def test_a_model_is_stored_and_loaded(
    make: Make, ids: Callable[..., Tensor], tmp_path: object
) -> None:
    model, row = (
        make(block_length=5, embedder="encoder", token_decoder="cross_attention"),
        ids(2, 15),
    )
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.method.to_dict() == model.method.to_dict()
    with torch.no_grad():
        assert torch.equal(again(row).nll, model(row).nll)


@pytest.mark.parametrize("token_decoder", ["prefix", "summation", "cross_attention"])
@pytest.mark.parametrize("embedder", ["lookup", "cls"])
def test_the_ids_of_the_tokenizer_are_used(
    config: DecoderConfig, ids: Callable[..., Tensor], token_decoder: str, embedder: str
) -> None:
    """A model whose vocabulary is turned by 5 gives what the other gave: no id is wired in."""
    method = resolve(
        {
            "block_transformer": {
                "encoder_width": 32, "token_decoder": token_decoder, "embedder": embedder,
            }
        }
    )  # fmt: skip
    torch.manual_seed(0)
    plain = BlockTransformer(config, method).eval()
    turned = BlockTransformer(config.with_(bos_id=5, pad_id=5), method).eval()
    state = plain.state_dict()
    tables = ("embedder.table.weight", "decoder.embedding.weight", "decoder.output.weight")
    turned.load_state_dict({k: v.roll(5, 0) if k.endswith(tables) else v for k, v in state.items()})
    text = ids(2, 10)
    other = (text + 5) % config.vocab_size
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, :3] = False
    with torch.no_grad():
        torch.testing.assert_close(turned(other, valid).nll, plain(text, valid).nll)
        one, two = (m.start(x, valid, new_tokens=5) for m, x in ((plain, text), (turned, other)))
        for _ in range(5):
            torch.testing.assert_close(two.logits, one.logits.roll(5, -1))
            token = one.logits.argmax(-1)
            one.step(token)
            two.step((token + 5) % config.vocab_size)
