"""Layers that read the keys and values of another: what a sharing method asks of every cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.methods.cache.ephemeral import EphemeralCache
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import one_pass_cache, open_cache
from kvlab.methods.cache.windows import ReadsWindow
from kvlab.methods.decoder.config import DecoderConfig, Sharing
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import resolve

KV_OF = (0, 0, 2, 0)
"""Layer 3 reads an early KV layer after a later one was written."""
WINDOWS = (3, None, 5, 4)
WINDOW = resolve({"sliding_window": {"window": 4}})


class KeepsAll(EphemeralCache):
    """Forgets nothing: what sharing must come out as."""

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        pass


def slots(config: DecoderConfig, method: object, rows: int) -> Cache:
    return open_cache(
        config, method, batch=2, tokens=rows, device=torch.device("cpu"),  # type: ignore[arg-type]
        dtype=torch.float32,
    )  # fmt: skip


def read(decoder: Decoder, text: Tensor, cache: Cache, chunks: tuple[int, ...]) -> Tensor:
    places = torch.arange(text.shape[1]).expand(text.shape)
    pieces = zip(text.split(chunks, 1), places.split(chunks, 1), strict=True)
    return torch.cat(
        [
            decoder.body(decoder.embed(some), where if i else None, cache, some)
            for i, (some, where) in enumerate(pieces)
        ],
        1,
    )


@pytest.mark.parametrize("windows", [None, WINDOWS])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (6, 1, 3, 1, 1)])
@pytest.mark.parametrize("limited", [False, True], ids=["full", "window"])
def test_slots(
    tiny: Callable[..., TokenModel],
    ids: Callable[..., Tensor],
    windows: tuple[int | None, ...] | None,
    chunks: tuple[int, ...],
    limited: bool,
) -> None:
    decoder = tiny("llama", layers=4, windows=windows, sharing=Sharing(KV_OF)).decoder
    text = ids(2, 12)
    method = WINDOW if limited else resolve({})
    policy = ReadsWindow(4) if limited else None
    with torch.inference_mode():
        expected = read(decoder, text, KeepsAll(decoder.config, policy), (12,))
        found = read(decoder, text, slots(decoder.config, method, 12), chunks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scoring_keeps_a_layer_until_its_last_reader(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    decoder, text = tiny("llama", layers=4, sharing=Sharing(KV_OF)).decoder, ids(2, 12)
    cache = one_pass_cache(decoder.config, resolve({}))
    assert isinstance(cache, EphemeralCache)
    expected = read(decoder, text, KeepsAll(decoder.config), (12,))
    torch.testing.assert_close(read(decoder, text, cache, (12,)), expected)
    assert not cache._rows


def test_only_kv_layers_take_bytes(tiny: Callable[..., TokenModel]) -> None:
    config = tiny("llama", layers=4, windows=WINDOWS, sharing=Sharing(KV_OF)).config
    row = 2 * 2 * config.kv_heads * config.head_dim * 4
    tables = 2 * 8 * (20 + 5)
    assert slots(config, resolve({}), 20).nbytes() == (20 + 5) * row + tables
