"""The decoder as a language model: scores, padding, parts, precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.build import build, convert
from kvlab.methods.decoder.config import PRESETS, ConfigError, DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import resolve


def test_scores_are_cross_entropy(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    text = ids(2, 9)
    score = model(text)
    decoder = model.decoder
    logits = decoder.head(decoder.body(decoder.embed(text)))[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    torch.testing.assert_close(score.nll[:, 1:], expected)
    assert (score.nll[:, 0] == 0).all()
    assert score.scored.sum() == 2 * 8
    assert score.nll.dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_scored_nor_read(
    model: TokenModel, ids: Callable[..., Tensor], side: str
) -> None:
    text = ids(1, 7)
    pad = (3, 0) if side == "left" else (0, 3)
    padded, valid = F.pad(text, pad), F.pad(torch.ones_like(text).bool(), pad)
    alone, among = model(text), model(padded, valid)
    assert among.scored.sum() == 6
    torch.testing.assert_close(among.nll[among.scored], alone.nll[alone.scored])
    assert (among.nll[~among.scored] == 0).all()
    among.nll.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_stating_positions_changes_nothing(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    text = ids(2, 9)
    hidden = model.decoder.embed(text)
    packed = model.decoder.body(hidden)
    stated = model.decoder.body(hidden, torch.arange(9).expand(2, 9))
    torch.testing.assert_close(packed, stated, rtol=1e-4, atol=1e-5)


def test_logits_do_not_see_the_future(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    text = ids(1, 8)
    changed = text.clone()
    changed[0, 5] = (text[0, 5] + 1) % 53
    one, other = model(text).nll, model(changed).nll
    torch.testing.assert_close(one[0, :5], other[0, :5])
    assert not torch.allclose(one[0, 6:], other[0, 6:], atol=1e-3)


def test_attention_reads_relative_positions(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    hidden = model.decoder.embed(ids(1, 6))
    at_start = model.decoder.body(hidden, torch.arange(6).unsqueeze(0))
    later = model.decoder.body(hidden, torch.arange(100, 106).unsqueeze(0))
    torch.testing.assert_close(at_start, later, rtol=1e-3, atol=1e-3)


def test_every_parameter_is_trained(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    model(ids(2, 9)).nll.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_part_without_tables(tiny: Callable[..., TokenModel]) -> None:
    whole = tiny("neox")
    part = Decoder(whole.config, embeddings=False, head=False)
    assert part.body_parameters() == sum(p.numel() for p in part.parameters())
    assert part.body_parameters() == whole.body_parameters()
    hidden = torch.randn(2, 5, 32)
    assert part.body(hidden).shape == (2, 5, 32)
    with pytest.raises(KvlabError, match="no embedding table"):
        part.embed(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(KvlabError, match="no head"):
        part.head(hidden)


def test_a_tied_head_is_the_embedding_table(tiny: Callable[..., TokenModel]) -> None:
    tied = tiny("llama3")
    assert tied.decoder.output is None
    hidden = torch.randn(1, 32)
    assert tied.decoder.embedding is not None
    torch.testing.assert_close(tied.decoder.head(hidden), hidden @ tied.decoder.embedding.weight.T)


def test_low_precision_keeps_exact_frequencies(
    model: TokenModel, ids: Callable[..., Tensor]
) -> None:
    text = ids(2, 9)
    expected = model(text).nll
    model.to(torch.bfloat16)
    assert model.decoder.frequencies.dtype == torch.float32
    torch.testing.assert_close(model(text).nll, expected, rtol=0.1, atol=0.25)


def test_autocast_trains(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    text = ids(2, 9)
    expected = model(text).nll
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = model(text).nll
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected, rtol=0.1, atol=0.25)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_a_lone_token_scores_nothing(model: TokenModel, ids: Callable[..., Tensor]) -> None:
    score = model(ids(2, 1))
    assert score.nll.tolist() == [[0.0], [0.0]]
    assert not score.scored.any()


def test_converting_to_tokens_copies(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    parent, text = tiny("llama"), ids(1, 5)
    child = convert(parent, resolve({}))
    torch.testing.assert_close(child(text).nll, parent(text).nll)
    with torch.no_grad():
        next(child.parameters()).add_(1)
    assert not torch.allclose(child(text).nll, parent(text).nll)


def test_a_block_model_does_not_become_tokens_again(tiny: Callable[..., TokenModel]) -> None:
    block = build(tiny("llama").config, resolve({"block_transformer": {"block_length": 2}}))
    with pytest.raises(KvlabError, match="cannot be converted back"):
        convert(block, resolve({}))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_decoders(preset: str) -> None:
    config = DecoderConfig(vocab_size=64, **PRESETS[preset])
    assert DecoderConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        assert TokenModel(config, resolve({})).body_parameters() > 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kv_heads": 3}, "kv_heads: must divide heads"),
        ({"layers": 0}, "layers: must be at least 1, found 0"),
        ({"head_dim": 7}, "must be even"),
        ({"windows": (4,)}, "one entry per layer"),
        ({"windows": (4, 0)}, "windows: must be at least 1"),
    ],
)
def test_sizes_that_make_no_decoder(
    tiny: Callable[..., TokenModel], changes: dict[str, object], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        tiny("llama").config.with_(**changes)


def test_unknown_settings_of_a_config() -> None:
    with pytest.raises(ConfigError, match="unknown decoder settings: depth"):
        DecoderConfig.from_dict({"depth": 3})
