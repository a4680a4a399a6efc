"""Generation: batches of unequal lengths, sampling, ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.decoder.generation import GenerationError, generate, pick
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.registry import resolve

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [2, 6]]


@pytest.mark.parametrize("written", ["full_attention", {"sliding_window": {"window": 4}}], ids=str)
def test_a_greedy_batch_is_its_prompts_one_by_one(model: TokenModel, written: object) -> None:
    apply = resolve(written)  # type: ignore[arg-type]
    together = generate(model, PROMPTS, 9, apply=apply)
    assert together == [generate(model, [p], 9, apply=apply)[0] for p in PROMPTS]
    assert all(len(row) == 9 for row in together)


def test_decode_is_the_argmax_of_the_parallel_forward(model: TokenModel) -> None:
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, 9), strict=True):
        text = torch.tensor([prompt + new])
        decoder = model.decoder
        parallel = decoder.head(decoder.body(decoder.embed(text))).argmax(-1)[0]
        assert parallel[len(prompt) - 1 : -1].tolist() == new


def test_sampling_follows_the_seed(tiny: Callable[..., TokenModel]) -> None:
    model = tiny("llama")
    options = {"temperature": 2.0, "top_k": 20, "top_p": 0.9}
    one, two, three = (generate(model, PROMPTS, 12, seed=s, **options) for s in (0, 0, 1))
    assert one == two != three
    assert generate(model, PROMPTS, 12, temperature=2.0, top_k=1) == generate(model, PROMPTS, 12)


def test_sampling_takes_only_what_it_may() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = pick(logits, 1.0, None, None, generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.1, 0.4, 0.3, 0.2]), rtol=0, atol=0.03)
    assert set(pick(logits, 1.0, 2, None, generator).tolist()) == {1, 2}
    assert set(pick(logits, 1.0, None, 0.65, generator).tolist()) == {1, 2}
    assert set(pick(logits, 1.0, None, 0.75, generator).tolist()) == {1, 2, 3}
    assert set(pick(logits, 1.0, None, 0.01, generator).tolist()) == {1}
    assert set(pick(logits, 1.0, 3, 0.5, generator).tolist()) == {1, 2}
    assert set(pick(logits, 0.01, None, None, generator).tolist()) == {1}


def test_a_continuation_ends_after_eos(tiny: Callable[..., TokenModel]) -> None:
    model = tiny("llama")
    whole = generate(model, PROMPTS, 40)
    eos = whole[0][5]
    ended = generate(model, PROMPTS, 40, eos=eos)
    for row, full in zip(ended, whole, strict=True):
        assert row == (full[: full.index(eos) + 1] if eos in full else full)


def test_no_tokens(tiny: Callable[..., TokenModel]) -> None:
    assert generate(tiny("llama"), PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ([], {}, "prompts: at least one"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 53]], {}, "ids must be from 0 to 52"),
        ([[1, -1]], {}, "ids must be from 0 to 52"),
        ([[1]], {"temperature": -1.0}, "temperature: at least 0, found -1.0"),
        ([[1]], {"top_k": 0}, "top_k: at least 1"),
        ([[1]], {"top_p": 1.5}, "top_p: above 0 and at most 1, found 1.5"),
    ],
)
def test_what_is_refused(
    tiny: Callable[..., TokenModel], prompts: list[list[int]], options: dict[str, float], error: str
) -> None:
    with pytest.raises(GenerationError, match=error):
        generate(tiny("llama"), prompts, 3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["full_attention", {"sliding_window": {"window": 4}}], ids=str)
def test_a_decode_step_never_waits_for_the_device(
    tiny: Callable[..., TokenModel], written: object
) -> None:
    """On the meta device tensors have no values, so reading one fails."""
    model = tiny("mistral").to("meta")
    ids = torch.ones(2, 6, dtype=torch.long, device="meta")
    session = model.start(ids, ids > 0, new_tokens=4, apply=resolve(written))  # type: ignore[arg-type]
    for _ in range(4):
        session.step(session.logits.argmax(-1))
    assert session.logits.shape == (2, 53)


@pytest.mark.parametrize("granularity", ["token", "block_transformer"])
def test_padding_behind_a_sequence_is_refused(granularity: str) -> None:
    """What is generated would stand at the first position again."""
    config = DecoderConfig(53, **llama(32, 4, 4, 2, 48))
    model, ids = build(config, resolve(granularity)), torch.arange(16).view(2, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    for wrong in (valid, valid & torch.tensor([[True], [False]])):
        with pytest.raises(KvlabError, match="sequence 1 is padding: pad on the left") as raised:
            model.start(ids, wrong, new_tokens=8)
        assert "\n" not in str(raised.value)
        session = model.start(ids, new_tokens=8)
        with pytest.raises(KvlabError, match=r"pad on the left|turns of one length"):
            session.extend(ids, wrong)
