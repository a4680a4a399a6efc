"""The slot cache: in-place rows, rings, chunked prompts, left padding, bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Method, resolve
from kvlab.methods.cache.policy import Policy
from kvlab.methods.cache.slots import SlotCache, open_cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.decoder.model import Decoder

FULL = resolve("full_attention")
WINDOW = resolve({"sliding_window": {"window": 4}})


def opened(config: DecoderConfig, method: Method, rows: int, batch: int = 2) -> SlotCache:
    cache = open_cache(
        config, method, batch=batch, tokens=rows, device=torch.device("cpu"), dtype=torch.float32
    )
    assert isinstance(cache, SlotCache)
    return cache


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

    full = Windowed(
        decoder.config,
        FULL["eviction"].value.load()(None),
        batch=len(ids),
        rows=ids.shape[1],
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
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
            read = [cache.read(layer).k.data_ptr() for layer in range(model.config.layers)]
            storages = [layer.k.data_ptr() for layer in cache._layers]
            assert read == storages
            before = cache.nbytes()
            here = torch.full((2, 1), 8)
            model.decoder.body(model.decoder.embed(ids(2, 1)), here, cache)
            assert [layer.k.data_ptr() for layer in cache._layers] == storages
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
    options = {"batch": 2, "rows": 13, "device": torch.device("cpu"), "dtype": torch.float32}

    class All(Sinks):
        def capacity(self, layer: int, rows: int) -> int:
            return rows

        def slot(self, row: int, capacity: int) -> int:
            return row

    with torch.inference_mode():
        kept = SlotCache(decoder.config, Sinks(None), **options)
        seen = over(kept, decoder, text, chunks, True)
        whole = SlotCache(decoder.config, All(None), **options)
        torch.testing.assert_close(
            seen, over(whole, decoder, text, (13,), True), rtol=1e-4, atol=1e-4
        )


def test_positions_count_each_samples_own_rows() -> None:
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    positions = positions_of(valid)
    assert positions is not None
    assert positions.tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert positions_of(None) is None
