"""Generation gives what one parallel pass gives, for every kind of model and any prompt."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.block_transformer.model import BlockTransformer
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.generation import generate, left_pad
from kvlab.methods.registry import resolve

Make = Callable[..., BlockTransformer]
EMBEDDERS = ["lookup", "projection", "encoder", "cls"]
DECODERS = ["prefix", "summation", "cross_attention"]
PROMPTS = [*range(1, 10)]
NEW = 9


def expected(model: BlockTransformer, prompt: list[int], new: list[int]) -> Tensor:
    """Logits [len(new), V] of the new tokens in one pass over left pads, prompt and new tokens."""
    length = model.params.block_length
    pads = -len(prompt) % length
    row = torch.tensor([[0] * pads + prompt + new])
    valid = torch.arange(row.shape[1])[None] >= pads
    with torch.no_grad():
        logits = model.logits(row, valid).flatten(1, 2)[0]
    first = pads + len(prompt) - length
    return logits[first : first + len(new)]


def replay(
    model: BlockTransformer, prompts: list[list[int]], new: Tensor, **rest: object
) -> Tensor:
    """Logits [B, n, V] of a session that is given the tokens `new` [B, n] one after another."""
    row, valid = left_pad(prompts, torch.device("cpu"))
    session = model.start(row, valid, new_tokens=new.shape[1] - 1, **rest)
    seen = [session.logits]
    seen += [session.step(new[:, i]) for i in range(new.shape[1] - 1)]
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("prefix", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_generation_is_the_parallel_pass(
    make: Make, ids: Callable[..., Tensor], prefix: int, length: int
) -> None:
    for embedder, decoder in itertools.product(EMBEDDERS, DECODERS):
        model = make(
            block_length=length, prefix_length=prefix, embedder=embedder, token_decoder=decoder
        )
        prompts = [ids(n).tolist() for n in PROMPTS]
        greedy = generate(model, prompts, NEW)
        logits = replay(model, prompts, torch.tensor(greedy))
        for i, (prompt, new) in enumerate(zip(prompts, greedy, strict=True)):
            parallel = expected(model, prompt, new)
            torch.testing.assert_close(logits[i], parallel, atol=1e-4, rtol=1e-4)
            assert parallel.argmax(-1).tolist() == new


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_is_its_prompts_one_by_one(
    make: Make, ids: Callable[..., Tensor], decoder: str
) -> None:
    model = make(block_length=4, token_decoder=decoder)
    prompts = [ids(n).tolist() for n in (1, 19, 4, 8, 5)]
    together = generate(model, prompts, 23)
    assert together == [generate(model, [prompt], 23)[0] for prompt in prompts]
    assert {len(new) for new in together} == {23}


def test_a_window_counts_blocks(make: Make, ids: Callable[..., Tensor]) -> None:
    """A window of two blocks forgets what lies before them; a large one changes nothing."""
    model = make(block_length=4, block_layers=1, token_layers=1)
    prompts = [ids(17).tolist(), ids(30).tolist()]
    new = ids(2, 12)
    full = replay(model, prompts, new)
    large = replay(model, prompts, new, apply=resolve({"sliding_window": {"window": 64}}))
    assert torch.equal(full, large)
    small = replay(model, prompts, new, apply=resolve({"sliding_window": {"window": 2}}))
    assert not torch.allclose(full, small, atol=1e-3)
    # One block layer: the last two whole blocks of the prompt are all that the next block sees.
    cut = replay(model, [p[-8:] for p in prompts], new)
    torch.testing.assert_close(small[:, :4], cut[:, :4], atol=1e-4, rtol=1e-4)


def test_windows_of_the_model_hold_in_generation(
    config: DecoderConfig, ids: Callable[..., Tensor]
) -> None:
    """A converted Mistral: windows of its block layers are those of both passes."""
    torch.manual_seed(0)
    method = resolve({"block_transformer": {"block_length": 2}})
    model = BlockTransformer(config.with_(windows=(8, None, 8, 8)), method).eval()
    assert model.sizes.block.windows == (4, None)
    prompts = [ids(n).tolist() for n in (3, 16, 23)]
    greedy = generate(model, prompts, NEW)
    for prompt, new in zip(prompts, greedy, strict=True):
        assert expected(model, prompt, new).argmax(-1).tolist() == new


def test_a_step_never_waits_for_the_device(make: Make, ids: Callable[..., Tensor]) -> None:
    """On the meta device reading a value is an error, so a step that runs there reads none."""
    model = make(block_length=2).to("meta")
    session = model.start(ids(2, 5).to("meta"), new_tokens=8)
    for _ in range(8):
        logits = session.step(torch.empty(2, dtype=torch.long, device="meta"))
    assert logits.shape == (2, model.config.vocab_size)


def test_nothing_is_held_but_cache_and_rows(make: Make, ids: Callable[..., Tensor]) -> None:
    model = make(block_length=4)
    session = model.start(ids(2, 8), new_tokens=32)
    before = session.kv_bytes()
    for _ in range(32):
        session.step(ids(2))
    assert session.kv_bytes() == before
    assert session.kv_tokens() == 2 * 40
    padded = model.start(
        ids(2, 8), torch.tensor([[True] * 8, [False] * 5 + [True] * 3]), new_tokens=1
    )
    assert padded.kv_tokens() == 11
