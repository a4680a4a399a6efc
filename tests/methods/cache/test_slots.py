"""The slot cache: in-place rows, rings, chunked prompts, left padding, bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Method
from kvlab.methods.cache.opening import Opening, open_cache
from kvlab.methods.cache.policy import Policy
from kvlab.methods.cache.slots import SlotCache
from kvlab.methods.cache.storage import PlainStorage
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import resolve

FULL = resolve("full_attention")
WINDOW = resolve({"sliding_window": {"window": 4}})


def opened(config: DecoderConfig, method: Method, rows: int, batch: int = 2) -> SlotCache:
    cache = open_cache(
        config, method, batch=batch, tokens=rows, device=torch.device("cpu"), dtype=torch.float32
    )
    assert isinstance(cache, SlotCache)
    return cache


def opening(config: DecoderConfig, batch: int, rows: int) -> Opening:
    return Opening(config, FULL, batch, rows, torch.device("cpu"), torch.float32)


def keys_of(cache: SlotCache) -> list[int]:
    """Where each layer's keys lie."""
    storages = [layer.storage for layer in cache._layers.values()]
    return [s.k.data_ptr() for s in storages if isinstance(s, PlainStorage)]


def over(
    cache: SlotCache, decoder: Decoder, ids: Tensor, chunks: tuple[int, ...], packed: bool
) -> Tensor:
    """Logits of a text read in chunks; the first without positions when packed."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    outputs = []
    for i, (some, where) in enumerate(
        zip(ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    ):
        known = None if packed and not i else where
        outputs.append(decoder.body(decoder.embed(some), known, cache, some))
    return decoder.head(torch.cat(outputs, 1))


def under(decoder: Decoder, ids: Tensor, window: int | None) -> Tensor:
    """Logits of one parallel pass under the same window."""

    class Windowed(SlotCache):
        def rule(self, layer: int, own: Rule) -> Rule:
            found = [w for w in (own.window, window) if w is not None]
            return Rule(window=min(found, default=None))

    full = Windowed(FULL["eviction"].value.load()(None), opening(decoder.config, *ids.shape))
    return decoder.head(decoder.body(decoder.embed(ids), None, full, ids))


@pytest.mark.parametrize(("method", "window"), [(FULL, None), (WINDOW, 4)], ids=["full", "window"])
@pytest.mark.parametrize("chunks", [(13,), (1,) * 13, (7, 1, 1, 3, 1), (2, 6, 1, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_any_way_of_reading_gives_the_same(
    model: TokenModel,
    ids: Callable[..., Tensor],
    method: Method,
    window: int | None,
    chunks: tuple[int, ...],
    packed: bool,
) -> None:
    text = ids(2, 13)
    with torch.inference_mode():
        cache = opened(model.config, method, 13)
        seen = over(cache, model.decoder, text, chunks, packed)
        torch.testing.assert_close(seen, under(model.decoder, text, window), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [FULL, WINDOW], ids=["full", "window"])
def test_padding_on_the_left_changes_nothing(
    model: TokenModel, ids: Callable[..., Tensor], method: Method
) -> None:
    text = ids(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :5] = False
    with torch.inference_mode():
        both = model.start(text, valid, new_tokens=4, apply=method)
        alone = model.start(text[1:, 5:], new_tokens=4, apply=method)
        for token in (3, 1, 4, 1):
            torch.testing.assert_close(both.logits[1:], alone.logits, rtol=1e-4, atol=1e-4)
            both.step(torch.tensor([2, token]))
            alone.step(torch.tensor([token]))
    assert both.kv_tokens() == 9 + 4 + 2 * 4
    assert alone.kv_tokens() == 4 + 4


def test_a_decode_step_moves_no_storage(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    model = tiny("mistral")
    for method in (FULL, WINDOW):
        cache = opened(model.config, method, 12)
        with torch.inference_mode():
            over(cache, model.decoder, ids(2, 8), (8,), True)
            storages = keys_of(cache)
            before = cache.nbytes()
            here = torch.full((2, 1), 8)
            model.decoder.body(model.decoder.embed(ids(2, 1)), here, cache)
            read = [cache.read(layer).k.data_ptr() for layer in range(model.config.layers)]
            assert keys_of(cache) == read == storages
            assert cache.nbytes() == before


def test_a_ring_frees_what_it_drops(tiny: Callable[..., TokenModel]) -> None:
    config = tiny("llama").config
    full, ring = opened(config, FULL, 64), opened(config, WINDOW, 64)
    assert full.nbytes() == 16 * ring.nbytes()


def test_layers_keep_no_more_than_their_own_window(tiny: Callable[..., TokenModel]) -> None:
    config = tiny("mistral").config  # windows 5, none, 5
    row = 2 * config.kv_heads * config.head_dim * 4
    tables = 8 * (5 + 20)
    assert opened(config, FULL, 20, batch=1).nbytes() == (5 + 20 + 5) * row + tables


def test_more_rows_than_opened_for(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    model = tiny("llama")
    session = model.start(ids(1, 5), new_tokens=1)
    session.step(torch.tensor([1]))
    with pytest.raises(KvlabError, match="opened for 6 positions and is asked for 7"):
        session.step(torch.tensor([1]))


def test_only_the_first_pass_may_leave_positions_out(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    decoder = tiny("llama").decoder
    cache = opened(decoder.config, FULL, 8)
    decoder.body(decoder.embed(ids(2, 3)), None, cache)
    with pytest.raises(KvlabError, match="only the first pass"):
        decoder.body(decoder.embed(ids(2, 2)), None, cache)


class Sinks(Policy):
    """The first two rows stay for good, the others are a ring (a later method's shape)."""

    def capacity(self, layer: int, rows: int) -> int:
        return min(6, rows)

    def slot(self, row: int, capacity: int) -> int:
        return row if row < 2 else 2 + (row - 2) % (capacity - 2)

    def rule(self, layer: int, own: Rule) -> Rule:
        return Rule(window=4, sinks=2)


@pytest.mark.parametrize("chunks", [(13,), (1,) * 13, (7, 1, 3, 1, 1)])
def test_a_policy_may_place_rows_as_it_likes(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], chunks: tuple[int, ...]
) -> None:
    decoder, text = tiny("llama").decoder, ids(2, 13)
    for_text = opening(decoder.config, 2, 13)

    class All(Sinks):
        def capacity(self, layer: int, rows: int) -> int:
            return rows

        def slot(self, row: int, capacity: int) -> int:
            return row

    with torch.inference_mode():
        kept = SlotCache(Sinks(None), for_text)
        seen = over(kept, decoder, text, chunks, True)
        whole = SlotCache(All(None), for_text)
        torch.testing.assert_close(
            seen, over(whole, decoder, text, (13,), True), rtol=1e-4, atol=1e-4
        )


def test_positions_count_each_samples_own_rows() -> None:
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    positions = positions_of(valid)
    assert positions is not None
    assert positions.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert positions_of(None) is None


@pytest.mark.parametrize("method", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("first", [2, 4])
def test_a_left_padded_prompt_may_come_in_parts(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], method: Method, first: int
) -> None:
    decoder, text = tiny("llama").decoder, ids(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :3] = False
    positions = positions_of(valid)
    assert positions is not None
    chunks = (first, 9 - first)
    cache = opened(decoder.config, method, 9)
    with torch.inference_mode():
        for some, where in zip(text.split(chunks, 1), positions.split(chunks, 1), strict=True):
            found = decoder.body(decoder.embed(some), where, cache, some)[:, -1]
        whole = opened(decoder.config, method, 9)
        expected = decoder.body(decoder.embed(text), positions, whole, text)[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def turns(decoder: Decoder, cache: SlotCache, text: Tensor, wanted: list[Tensor]) -> Tensor:
    """Hidden states of a text [1, T] whose turns and padding have the positions `wanted`."""
    found, place = [], 0
    for where in wanted:
        real = where[0] >= 0
        some = torch.full_like(where, 7)
        some[:, real] = text[:, place : place + int(real.sum())]
        place += int(real.sum())
        found.append(decoder.body(decoder.embed(some), where, cache, some)[:, real])
    return torch.cat(found, 1)


TURNS = [
    torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4]]), torch.tensor([[-1, -1, 5, 6]]),
    torch.tensor([[7]]), torch.tensor([[-1, 8]]), torch.tensor([[9]]),
]  # fmt: skip


@pytest.mark.parametrize("bare", [False, True])
def test_turns_of_unequal_length(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], bare: bool
) -> None:
    """Padding between turns is read by nobody, though the first prompt had none."""
    decoder, text = tiny("llama").decoder, ids(1, 10)
    with torch.inference_mode():
        expected = decoder.body(decoder.embed(text))
        cache = opened(decoder.config, FULL, 16, batch=1)
        first = decoder.body(
            decoder.embed(text[:, :4]), None if bare else TURNS[0], cache, text[:, :4]
        )
        rest = turns(decoder, cache, text[:, 4:], TURNS[1:])
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-4, atol=1e-4)


def test_turns_of_unequal_length_over_a_ring(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    """A ring goes by the numbers of rows, so padding inside it would push out rows that count."""
    decoder, text = tiny("llama").decoder, ids(1, 10)
    cache = opened(decoder.config, WINDOW, 16, batch=1)
    with pytest.raises(KvlabError, match="padding between the turns"):
        turns(decoder, cache, text, TURNS)


def test_a_later_part_is_written_where_it_stays(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    """Reading more of a prompt copies no past row where nothing is pushed out."""
    decoder, text = tiny("llama").decoder, ids(2, 9)
    cache = opened(decoder.config, FULL, 9)
    with torch.inference_mode():
        over(cache, decoder, text, (4, 5), True)
        assert [cache.read(layer).k.data_ptr() for layer in (0, 1)] == keys_of(cache)
