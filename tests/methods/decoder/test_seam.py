"""The seam's proof: what a cache may do to the past without the decoder's output changing.

Every cache here stands for a later method: rows in another order, query rows of its own, keys that
are rotated only when they are read, rows of their own for every KV head, and evictions that follow
the attention mass.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.decoder.model import Decoder


def packed(k: Tensor) -> Tensor:
    """The positions [B, T] of a pass that leaves them out, for keys [B, H_kv, T, D]."""
    return torch.arange(k.shape[2]).expand(len(k), k.shape[2])


class Log(Cache):
    """Keeps every row, in the order of arrival; the caches below change one thing each."""

    def __init__(self) -> None:
        self.rows: dict[int, Keys] = {}
        self.calls: list[str] = []

    def plan(self, step: Step) -> Extra | None:
        self.calls.append("plan")
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self.calls.append(f"write {layer}")
        if positions is None:
            positions = packed(k)
        known = self.rows.get(layer)
        if known is not None:
            assert known.positions is not None
            k, v = torch.cat((known.k, k), 2), torch.cat((known.v, v), 2)
            positions = torch.cat((known.positions, positions), -1)
        self.rows[layer] = Keys(k, v, positions)

    def read(self, layer: int) -> Keys:
        self.calls.append(f"read {layer}")
        return self.rows[layer]

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        self.calls.append(f"observe {layer}")

    def finish(self) -> None:
        self.calls.append("finish")

    def nbytes(self) -> int:
        return 0


class Shuffled(Log):
    """Hands out the rows of every layer in an order of its own."""

    def read(self, layer: int) -> Keys:
        k, v, positions, _ = super().read(layer)
        assert positions is not None
        order = torch.randperm(k.shape[2])
        return Keys(k[:, :, order], v[:, :, order], positions[:, order])


class PerHead(Log):
    """Every KV head has its rows in its own order, with empty slots among them."""

    def read(self, layer: int) -> Keys:
        k, v, positions, _ = super().read(layer)
        assert positions is not None
        heads, rows = k.shape[1], k.shape[2]
        orders = torch.stack([torch.randperm(rows + 3) for _ in range(heads)])
        poison = torch.full_like(k[:, :, :3], 1e4)

        def deal(x: Tensor) -> Tensor:
            dealt = torch.cat((x, poison), 2)
            return torch.stack([dealt[:, h, orders[h]] for h in range(heads)], 1)

        wide = torch.nn.functional.pad(positions, (0, 3), value=EMPTY)
        return Keys(deal(k), deal(v), torch.stack([wide[:, o] for o in orders], 1))


class Unrotated(Log):
    """Keeps keys as they were projected; the decoder rotates what it reads."""

    rotates = True

    def rotary_positions(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        known = self.rows[layer].positions
        assert known is not None
        return positions, known


class Rebuilding(Log):
    """Adds query rows: one past token is dropped, and computed again beside every step."""

    def __init__(self, dropped: int, ids: Tensor) -> None:
        super().__init__()
        self.dropped, self.ids = dropped, ids
        self.beside: dict[int, Keys] = {}
        self.extra = 0

    def plan(self, step: Step) -> Extra | None:
        batch = len(self.ids)
        newest = step.rows - 1 if step.positions is None else int(step.positions.max())
        if newest <= self.dropped:
            self.extra = 0
            return None
        self.extra = 2  # the dropped token, and a row that no sample needs
        positions = torch.tensor([[self.dropped, EMPTY]]).expand(batch, 2)
        ids = torch.stack((self.ids[:, self.dropped], self.ids[:, 0]), 1)
        return Extra(ids, positions)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        assert positions is not None
        end = k.shape[2] - self.extra
        self.beside[layer] = Keys(k[:, :, end:], v[:, :, end:], positions[:, end:])
        k, v, positions = k[:, :, :end], v[:, :, :end], positions[:, :end]
        keep = positions[0] != self.dropped
        super().write(layer, k[:, :, keep], v[:, :, keep], positions[:, keep])

    def read(self, layer: int) -> Keys:
        k, v, positions, _ = super().read(layer)
        other = self.beside[layer]
        assert positions is not None
        assert other.positions is not None
        return Keys(
            torch.cat((k, other.k), 2),
            torch.cat((v, other.v), 2),
            torch.cat((positions, other.positions), 1),
        )


def logits(
    decoder: Decoder, ids: Tensor, cache: Cache, chunks: tuple[int, ...], bare: bool = False
) -> Tensor:
    """The logits of a text read in chunks over one cache; `bare`: the first has no positions."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    pieces = zip(ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    hidden = [
        decoder.body(decoder.embed(some), None if bare and not i else where, cache, some)
        for i, (some, where) in enumerate(pieces)
    ]
    return decoder.head(torch.cat(hidden, 1))


@pytest.mark.parametrize("kind", [Log, Shuffled, PerHead, Unrotated])
@pytest.mark.parametrize("chunks", [(11,), (6, 3, 1, 1)])
@pytest.mark.parametrize("bare", [False, True], ids=["positions", "bare"])
def test_nothing_changes(
    model: TokenModel,
    ids: Callable[..., Tensor],
    kind: type[Log],
    chunks: tuple[int, ...],
    bare: bool,
) -> None:
    text = ids(2, 11)
    with torch.inference_mode():
        plain = model.decoder.head(model.decoder.body(model.decoder.embed(text)))
        seen = logits(model.decoder, text, kind(), chunks, bare)
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)


def test_keys_kept_unrotated_of_a_packed_pass(
    model: TokenModel, ids: Callable[..., Tensor]
) -> None:
    hidden = model.decoder.embed(ids(2, 7))
    torch.testing.assert_close(
        model.decoder.body(hidden, None, Unrotated()), model.decoder.body(hidden),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("chunks", [(11,), (5, 1, 3, 1, 1)])
@pytest.mark.parametrize("bare", [False, True], ids=["positions", "bare"])
def test_rows_of_the_cache_run_beside_the_callers(
    model: TokenModel, ids: Callable[..., Tensor], chunks: tuple[int, ...], bare: bool
) -> None:
    """Dropping token 0 and rebuilding it changes nothing: it never saw a past that is gone."""
    text = ids(2, 11)
    with torch.inference_mode():
        plain = model.decoder.head(model.decoder.body(model.decoder.embed(text)))
        seen = logits(model.decoder, text, Rebuilding(0, text), chunks, bare)
    assert seen.shape == plain.shape
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bare", [False, True], ids=["positions", "bare"])
def test_the_order_of_calls(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], bare: bool
) -> None:
    cache, text = Log(), ids(1, 3)
    logits(tiny("llama").decoder, text, cache, (3,), bare)
    per_layer = [f"{call} {layer}" for layer in (0, 1) for call in ("write", "read", "observe")]
    assert cache.calls == ["plan", *per_layer, "finish"]


def by_head(k: Tensor, positions: Tensor | None) -> Tensor:
    """Positions [B, H_kv, T]: every KV head keeps its own rows."""
    positions = packed(k) if positions is None else positions
    return positions.unsqueeze(1).expand(-1, k.shape[1], -1)


class HeavyHitters(Log):
    """Per sample and KV head, keeps the newest row and those with the most attention mass."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.mass: dict[int, Tensor] = {}

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        super().write(layer, k, v, by_head(k, positions))

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert key_mass is not None
        k, v, positions, _ = self.rows[layer]
        assert positions is not None
        heads, rows = k.shape[1], k.shape[2]
        mass = key_mass.unflatten(1, (heads, -1)).sum(2)
        if layer in self.mass:
            mass = mass + torch.nn.functional.pad(
                self.mass[layer], (0, rows - self.mass[layer].shape[-1])
            )
        ranked = mass.clone()
        ranked[..., -1] = float("inf")
        stay = ranked.topk(min(self.keep, rows)).indices
        across = stay.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        self.mass[layer] = mass.gather(2, stay)
        self.rows[layer] = Keys(k.gather(2, across), v.gather(2, across), positions.gather(2, stay))


def dropping_mask(decoder: Decoder, text: Tensor, keep: int) -> Tensor:
    """The same evictions by masks: the whole past is computed, attention written out."""
    rows = text.shape[1]
    config = decoder.config
    group = config.heads // config.kv_heads
    gone = torch.zeros(config.layers, config.kv_heads, rows, dtype=torch.bool)
    mass = torch.zeros(config.layers, config.kv_heads, rows)
    cache = Masked(gone)
    outputs = []
    for t in range(rows):
        some = text[:, t : t + 1]
        outputs.append(decoder.body(decoder.embed(some), torch.tensor([[t]]), cache, some))
        for layer in range(config.layers):
            share = cache.mass[layer][0].unflatten(0, (config.kv_heads, group)).sum(1)
            mass[layer, :, : t + 1] += share
            ranked = mass[layer, :, : t + 1].masked_fill(gone[layer, :, : t + 1], -1.0)
            ranked[:, -1] = float("inf")
            stay = ranked.topk(min(keep, int((~gone[layer, 0, : t + 1]).sum()))).indices
            gone[layer, :, : t + 1] = True
            gone[layer].scatter_(1, stay, False)
    return decoder.head(torch.cat(outputs, 1))


class Masked(Log):
    """Keeps every row; those marked as gone have an empty position."""

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        self.gone = gone
        self.mass: dict[int, Tensor] = {}

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(None)

    def read(self, layer: int) -> Keys:
        k, v, positions, _ = super().read(layer)
        assert positions is not None
        gone = self.gone[layer, :, : k.shape[2]].unsqueeze(0)
        return Keys(k, v, positions.unsqueeze(1).masked_fill(gone, EMPTY))

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert key_mass is not None
        self.mass[layer] = key_mass


@pytest.mark.parametrize("family_name", ["llama", "neox"])
@pytest.mark.parametrize("bare", [False, True], ids=["positions", "bare"])
def test_evictions_that_follow_the_mass_of_each_head(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], family_name: str, bare: bool
) -> None:
    decoder, text = tiny(family_name).decoder, ids(1, 12)
    with torch.inference_mode():
        by_cache = logits(decoder, text, HeavyHitters(4), (1,) * 12, bare)
        by_mask = dropping_mask(decoder, text, 4)
        plain = decoder.head(decoder.body(decoder.embed(text)))
    torch.testing.assert_close(by_cache, by_mask, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_cache, plain, atol=1e-2)


class Snapshot(Log):
    """SnapKV's shape: after the prompt, each KV head keeps the rows its last queries look at most.

    Layer 0 keeps everything, and a decode step asks for no mass at all.
    """

    def __init__(self, window: int, keep: int) -> None:
        super().__init__()
        self.window, self.keep = window, keep
        self.prompt = False
        self.asked: list[int] = []

    def plan(self, step: Step) -> Extra | None:
        self.prompt = step.rows > 1
        return None

    def key_mass_rows(self, layer: int) -> slice | None:
        return slice(-self.window, None) if self.prompt and layer else None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        super().write(layer, k, v, by_head(k, positions))

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        assert (key_mass is not None) == (self.prompt and layer > 0)
        if key_mass is None:
            return
        k, v, positions, _ = self.rows[layer]
        assert positions is not None
        self.asked.append(layer)
        old = k.shape[2] - self.window
        mass = key_mass.unflatten(1, (k.shape[1], -1)).sum(2)[..., :old]
        newest = torch.arange(old, k.shape[2]).expand(*mass.shape[:2], -1)
        stay = torch.cat((mass.topk(self.keep).indices, newest), -1)
        across = stay.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        self.rows[layer] = Keys(k.gather(2, across), v.gather(2, across), positions.gather(2, stay))


def snapshot_mask(decoder: Decoder, text: Tensor, prompt: int, window: int, keep: int) -> Tensor:
    """The same by masks, the mass taken from one query at a time."""
    config = decoder.config
    gone = torch.zeros(config.layers, config.kv_heads, text.shape[1], dtype=torch.bool)
    mass = torch.zeros(config.layers, config.kv_heads, prompt)
    cache, outputs = Masked(gone), []
    for t in range(text.shape[1]):
        if t == prompt:
            old = prompt - window
            gone[1:, :, :old] = True
            gone[1:].scatter_(2, mass[1:, :, :old].topk(keep).indices, False)
        some = text[:, t : t + 1]
        outputs.append(decoder.body(decoder.embed(some), torch.tensor([[t]]), cache, some))
        if prompt - window <= t < prompt:
            for layer in range(config.layers):
                share = cache.mass[layer][0].unflatten(0, (config.kv_heads, -1)).sum(1)
                mass[layer, :, : t + 1] += share
    return decoder.head(torch.cat(outputs, 1))


@pytest.mark.parametrize("family_name", ["llama", "qwen3", "neox"])
@pytest.mark.parametrize("bare", [False, True], ids=["positions", "bare"])
def test_evictions_that_follow_the_last_queries_of_a_prompt(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor], family_name: str, bare: bool
) -> None:
    decoder, text = tiny(family_name).decoder, ids(1, 14)
    cache = Snapshot(window=3, keep=2)
    with torch.inference_mode():
        by_cache = logits(decoder, text, cache, (9, 1, 1, 1, 1, 1), bare)
        by_mask = snapshot_mask(decoder, text, 9, 3, 2)
        plain = decoder.head(decoder.body(decoder.embed(text)))
    torch.testing.assert_close(by_cache, by_mask, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_cache[:, 9:], plain[:, 9:], atol=1e-2)
    assert cache.asked == [1]


class Tighter(Log):
    """Asks for its own mask rule."""

    def rule(self, layer: int, own: Rule) -> Rule:
        return Rule(strict=True)


def test_a_cache_may_tighten_the_rule(
    tiny: Callable[..., TokenModel], ids: Callable[..., Tensor]
) -> None:
    """Under j < p the first row reads nothing, so its attention adds nothing but a bias."""
    decoder, text = tiny("llama", layers=1).decoder, ids(1, 4)
    seen: list[Tensor] = []

    class Watching(Tighter):
        def observe(
            self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None
        ) -> None:
            seen.append((after - before).abs().amax(-1))

    with torch.inference_mode():
        logits(decoder, text, Watching(), (4,))
    assert (seen[0][:, 0] == 0).all()
    assert (seen[0][:, 1:] > 0).all()
