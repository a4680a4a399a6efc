"""Generation over a cache of the KV layers alone gives what one token after another gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.generation import generate, left_pad
from kvlab.methods.decoder.language_model import TokenModel, positions_of
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.registry import resolve

KvOf = tuple[int, ...]
Make = Callable[..., TokenModel]
Ids = Callable[..., Tensor]
Twin = Callable[..., Any]

WINDOWS = (3, None, 3, 3, 2, 3)
FAMILIES = ["llama", "qwen3", "neox"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
DEVICE = torch.device("cpu")
TEXT = torch.tensor(
    [[11, 3, 41, 3, 0, 27, 52, 8, 8, 30, 19, 5], [7, 50, 2, 2, 33, 4, 1, 9, 46, 0, 12, 13]]
)


def cache_of(decoder: Decoder, rows: int, apply: dict[str, Any] | None = None) -> Cache:
    return open_cache(
        decoder.config, resolve(apply or {}), batch=2, tokens=rows, device=DEVICE,
        dtype=torch.float64,
    )  # fmt: skip


def read(
    decoder: Decoder,
    ids: Tensor,
    cache: Cache,
    chunks: tuple[int, ...],
    valid: Tensor | None = None,
    bare: bool = False,
) -> Tensor:
    """Logits [B, T, V] of a text that is given in chunks; `bare`: the first without positions."""
    positions = positions_of(torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)
    assert positions is not None
    pieces = zip(ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    hidden = [
        decoder.body(decoder.embed(some), None if bare and not i else where, cache, some)
        for i, (some, where) in enumerate(pieces)
    ]
    return decoder.head(torch.cat(hidden, 1))


def exact(twin: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, V], each sample by itself."""
    return torch.stack([twin.exact(sample) for sample in ids])


class Scattered(Cache):
    """Keeps every row, and hands each layer's out in an order of its own, empty ones among them."""

    def __init__(self) -> None:
        self.rows: dict[int, Keys] = {}
        self.fresh: dict[int, Keys] = {}
        self.shown: dict[int, Tensor] = {}
        self.observed: list[int] = []

    def plan(self, step: Step) -> Extra | None:
        self.observed.clear()
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if positions is None:
            positions = torch.arange(k.shape[2]).expand(len(k), -1)
        self.fresh[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys | None:
        joined = self.joined(layer)
        if joined is None:
            return None
        k, v, positions, _ = joined
        assert positions is not None
        order = torch.randperm(k.shape[2] + 2)
        poison = torch.full_like(k[:, :, :1], 1e3).expand(-1, -1, 2, -1)
        self.shown[layer] = nn.functional.pad(positions, (0, 2), value=EMPTY)[:, order]
        return Keys(
            torch.cat((k, poison), 2)[:, :, order],
            torch.cat((v, poison), 2)[:, :, order],
            self.shown[layer],
        )

    def joined(self, layer: int) -> Keys | None:
        parts = [some[layer] for some in (self.rows, self.fresh) if layer in some]
        if len(parts) < 2:
            return parts[0] if parts else None
        past, new = parts
        assert past.positions is not None
        assert new.positions is not None
        return Keys(
            torch.cat((past.k, new.k), 2),
            torch.cat((past.v, new.v), 2),
            torch.cat((past.positions, new.positions), 1),
        )

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        self.observed.append(layer)

    def finish(self) -> None:
        for layer in self.fresh:
            joined = self.joined(layer)
            assert joined is not None
            self.rows[layer] = joined
        self.fresh.clear()

    def nbytes(self) -> int:
        return 0


class Unrotated(Scattered):
    """Keeps keys as they were projected: each reader rotates what it read."""

    rotates = True

    def rotary_positions(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return positions, self.shown[layer]


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, ...]:
    """Any map at all of two to five layers."""
    layers = draw(st.integers(2, 5))
    return tuple(draw(st.integers(0, layers - 1)) for _ in range(layers))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, ...]:
    """Chunks of one to five rows that make up twelve."""
    chunks: list[int] = []
    while (left := 12 - sum(chunks)) > 0:
        chunks.append(draw(st.integers(1, min(5, left))))
    return tuple(chunks)


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("kind", ["slots", "window", "scattered", "unrotated"])
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(kv_of=maps(), chunks=cuts(), strict=st.booleans(), bare=st.booleans())
def test_any_map_in_any_chunks(
    shared: Make,
    slow: Twin,
    family_name: str,
    kind: str,
    kv_of: tuple[int, ...],
    chunks: tuple[int, ...],
    strict: bool,
    bare: bool,
) -> None:
    """As many passes as a chunk has rows: whatever is fed comes out exact.

    "window": what leaves the ring is gone, also where a chunk pushes out what it still reads.
    """
    decoder = shared(family_name, kv_of, strict=strict, forward_passes=4).decoder
    window = 3 if kind == "window" else None
    cache = {
        "slots": lambda: cache_of(decoder, 12),
        "window": lambda: cache_of(decoder, 12, {"sliding_window": {"window": 3}}),
        "scattered": Scattered,
        "unrotated": Unrotated,
    }[kind]()
    with torch.inference_mode():
        expected = exact(slow(decoder, window), TEXT)
        found = read(decoder, TEXT, cache, chunks, bare=bare)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("chunks", [(1,) * 12, (7, 1, 1, 1, 1, 1), (3, 2, 1, 4, 1, 1)])
def test_windows_of_the_model_and_of_the_cache(
    shared: Make, slow: Twin, kv_of: KvOf, chunks: tuple[int, ...]
) -> None:
    """Layers with other windows read one KV layer: its ring is as long as the longest."""
    decoder = shared("llama", kv_of, windows=WINDOWS, forward_passes=9).decoder
    for window, apply in ((None, {}), (4, {"sliding_window": {"window": 4}})):
        with torch.inference_mode():
            expected = exact(slow(decoder, window), TEXT)
            found = read(decoder, TEXT, cache_of(decoder, 12, apply), chunks, bare=True)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("apply", [{}, {"sliding_window": {"window": 3}}], ids=["full", "window"])
@pytest.mark.parametrize("family_name", FAMILIES)
def test_prompts_of_unequal_length(
    shared: Make, ids: Ids, slow: Twin, kv_of: KvOf, family_name: str, apply: dict[str, Any]
) -> None:
    """Left-padded prompts continue as each would alone, token by token from its first."""
    model = shared(family_name, kv_of, windows=WINDOWS)
    twin = slow(model.decoder, 3 if apply else None)
    prompts, new = [ids(n).tolist() for n in (7, 1, 4)], ids(3, 5)
    row, valid = left_pad(prompts, DEVICE)
    session = model.start(row, valid, new_tokens=5, apply=resolve(apply))
    seen = torch.stack([session.logits, *(session.step(token) for token in new.T)], 1)
    with torch.no_grad():
        for sample, prompt in enumerate(prompts):
            alone = twin.exact(torch.cat((torch.tensor(prompt), new[sample])))
            torch.testing.assert_close(seen[sample], alone[len(prompt) - 1 :], **CLOSE)


def test_turns_of_unequal_length(shared: Make, slow: Twin, kv_of: KvOf) -> None:
    """A second turn of several rows, padded on the left too, over a cache that holds the first."""
    decoder = shared("llama", kv_of, forward_passes=5).decoder
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :2] = valid[1, 6:9] = False
    with torch.inference_mode():
        found = read(decoder, TEXT, cache_of(decoder, 12), (6, 5, 1), valid)
        for sample in range(2):
            alone = slow(decoder).exact(TEXT[sample, valid[sample]])
            torch.testing.assert_close(found[sample, valid[sample]], alone, **CLOSE)


@pytest.mark.parametrize("family_name", ["llama", "neox"])
def test_a_batch_is_its_prompts_one_by_one(
    shared: Make, ids: Ids, kv_of: KvOf, family_name: str
) -> None:
    model = shared(family_name, kv_of, forward_passes=2, backward_passes=1)
    prompts = [ids(n).tolist() for n in (1, 9, 4, 6)]
    together = generate(model, prompts, 8)
    assert together == [generate(model, [prompt], 8)[0] for prompt in prompts]


def test_bytes_are_those_of_the_kv_layers(shared: Make, ids: Ids, kv_of: KvOf) -> None:
    for windows in (None, WINDOWS):
        model = shared("llama", kv_of, **({"windows": windows} if windows else {}))
        c = model.config
        session = model.start(ids(3, 6), new_tokens=14)
        before = session.kv_bytes()
        for _ in range(14):
            session.step(ids(3))
        assert session.kv_bytes() == before
        reach = {
            kv: max(20 if windows is None else windows[i] or 20
                    for i, read_layer in enumerate(kv_of) if read_layer == kv)
            for kv in kv_of
        }  # fmt: skip
        row = 2 * c.kv_heads * c.head_dim * 8
        tables = 8 * sum(set(reach.values()))
        assert before == 3 * (sum(reach.values()) * row + tables)


def test_a_step_runs_each_layer_once(shared: Make, kv_of: KvOf) -> None:
    """A prompt may take several passes; a cache sees each layer once all the same, in order."""
    decoder, cache = shared("llama", kv_of).decoder, Scattered()
    run: list[int] = []
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: run.append(i))
    for chunk in (TEXT[:, :7], TEXT[:, 7:8]):
        run.clear()
        positions = torch.arange(chunk.shape[1]).expand(chunk.shape)
        with torch.inference_mode():
            decoder.body(decoder.embed(chunk), positions, cache, chunk)
        assert cache.observed == list(range(6))
    assert run == list(range(6))


def test_a_step_never_waits_for_the_device(shared: Make, ids: Ids, kv_of: KvOf) -> None:
    """On the meta device reading a value is an error, so a step that runs there reads none."""
    model = shared("llama", kv_of).to("meta")
    session = model.start(ids(2, 5).to("meta"), new_tokens=4)
    for _ in range(4):
        logits = session.step(torch.empty(2, dtype=torch.long, device="meta"))
    assert logits.shape == (2, model.config.vocab_size)
