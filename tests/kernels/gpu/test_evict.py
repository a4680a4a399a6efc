"""A decode step's eviction on a GPU against its twin: slots, positions and scores to the bit."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvlab.kernels import evict as twin
from kvlab.kernels.attention import EMPTY
from kvlab.kernels.evict import Stays

BATCH = 3


class Case(NamedTuple):
    positions: Tensor
    newest: Tensor
    stays: Stays
    given: dict[str, Tensor]


def case(
    shape: tuple[int, ...],
    by: str,
    *,
    free: float = 0.3,
    group: int = 2,
    window: bool = False,
    each: bool = False,
    windows: bool = False,
) -> Case:
    """Rows in shuffled slots, some of them free, with many ties; sums are exact in any order.

    Args: each: what stays differs from layer to layer; windows: so does the window.
    """
    capacity, counts = shape[-1], shape[:-2] if each else (BATCH,)
    positions = torch.rand(*shape[:-1], 2 * capacity).argsort(-1)[..., :capacity]
    positions = positions.masked_fill(torch.rand(shape) < free, EMPTY)
    newest = torch.full((BATCH,), 2 * capacity) + torch.arange(BATCH)
    given = {}
    if by == "scores":
        given["scores"] = torch.randint(-1, 3, shape).float() / 2
        if len(shape) == 3:
            seen = random.randint(0, capacity)
            mass = torch.randint(3, (BATCH, shape[1] * group, seen)).float() / 4
            given["mass"] = mass.transpose(1, 2).contiguous().transpose(1, 2)
    elif by == "known":
        given["known"] = torch.randint(4, (*shape[:-2], 2 * capacity + BATCH)).float()
    reach: int | Tensor | None = random.randint(1, 2 * capacity) if window else None
    if windows:
        reach = torch.randint(1, 2 * capacity + 2, shape[:1]).masked_fill(
            torch.rand(shape[0]) < 0.3, 2**40
        )
    stays = Stays(
        recent=torch.randint(0, capacity + 1, counts),
        sinks=random.randint(0, 4),
        window=reach,
        usable=torch.randint(1, capacity + 1, counts),
    )
    return Case(positions, newest, stays, given)


def on(device: torch.device, value: Any) -> Any:
    """A copy of tensors, of the same strides."""
    if isinstance(value, Stays):
        return Stays(*(on(device, part) for part in value))
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    return value.clone().to(device) if isinstance(value, Tensor) else value


def same(device: torch.device, known: Case) -> None:
    from kvlab.kernels.gpu.evict import evict

    expected, found = (Case(*(on(d, part) for part in known)) for d in ("cpu", device))
    slots = evict(found.positions, found.newest, found.stays, **found.given)
    wanted = twin.evict(expected.positions, expected.newest, expected.stays, **expected.given)
    assert torch.equal(slots.cpu(), wanted)
    assert torch.equal(found.positions.cpu(), expected.positions)
    if "scores" in known.given:
        assert torch.equal(found.given["scores"].cpu(), expected.given["scores"])


@pytest.mark.parametrize("by", ["age", "scores", "known"])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(
    "shape", [(BATCH, 1, 1), (BATCH, 2, 5), (2, BATCH, 1, 70), (2, BATCH, 3, 9)]
)
@pytest.mark.usefixtures("seed")
def test_slots(device: torch.device, shape: tuple[int, ...], by: str, window: bool) -> None:
    if by == "known" and shape[-2] > 1:
        shape = (*shape[:-2], 1, shape[-1])
    for free in (0.0, 0.3, 1.0):
        for group in (1, 4):
            each = group > 1
            same(device, case(shape, by, free=free, group=group, window=window, each=each))


@pytest.mark.parametrize("by", ["age", "scores", "known"])
@pytest.mark.parametrize("shape", [(5, BATCH, 1, 70), (6, BATCH, 3, 9), (1, BATCH, 1, 1)])
@pytest.mark.usefixtures("seed")
def test_windows_of_each_layer(device: torch.device, shape: tuple[int, ...], by: str) -> None:
    from kvlab.kernels.gpu.evict import evict

    if by == "known":
        shape = (*shape[:-2], 1, shape[-1])
    for free in (0.0, 0.1):
        known = case(shape, by, free=free, windows=True)
        same(device, known)
        far = known.stays.window
        assert isinstance(far, Tensor)
        same(device, known._replace(stays=Stays(window=far.clamp_max(2**31 - 1).int())))
    gaps = Stays(window=torch.stack((far, far.flip(0) + 1), 1).to(device)[:, 0])
    slots = evict(known.positions.clone().to(device), known.newest.to(device), gaps)
    assert torch.equal(slots.cpu(), twin.evict(known.positions, known.newest, Stays(window=far)))


@pytest.mark.parametrize("by", ["age", "scores", "known"])
@pytest.mark.usefixtures("seed")
def test_slots_in_several_tiles(
    device: torch.device, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlab.kernels.gpu import evict

    monkeypatch.setattr(evict, "TILE", 32)
    heads = 1 if by == "known" else 2
    for capacity in (32, 33, 150):
        same(device, case((BATCH, heads, capacity), by, free=0.0, group=8))
        same(device, case((BATCH, heads, capacity), by, free=0.01))


@pytest.mark.usefixtures("seed")
def test_bare_rules_and_narrow_integers(device: torch.device) -> None:
    known = case((BATCH, 2, 20), "age", free=0.0)
    for stays in (Stays(), Stays(sinks=3), Stays(recent=known.stays.recent)):
        same(device, known._replace(stays=stays))
    narrow = Stays(known.stays.recent.int(), 1, None, known.stays.usable.int())
    same(device, Case(known.positions.int(), known.newest.int(), narrow, {}))


def test_ages_beyond_what_a_float_can_tell_apart(device: torch.device) -> None:
    positions = (torch.tensor([3, 2, 1, 4]) + 2**24).expand(BATCH, 1, -1)
    same(device, Case(positions, torch.full((BATCH,), 2**24 + 5), Stays(), {}))


def test_zeros_of_both_signs_are_equal_and_infinities_are_in_order(device: torch.device) -> None:
    inf = float("inf")
    for row in ([1.0, 0.0, -0.0], [inf, inf, inf], [1.0, -inf, -inf], [inf, 3e38, inf]):
        positions = torch.arange(3).expand(BATCH, 1, -1)
        scores = torch.tensor(row).expand(BATCH, 1, -1)
        same(device, Case(positions, torch.full((BATCH,), 9), Stays(), {"scores": scores}))


def test_a_score_that_is_no_number_never_leads_out_of_the_slots(device: torch.device) -> None:
    from kvlab.kernels.gpu.evict import evict

    positions = torch.arange(3, device=device).repeat(BATCH, 1, 1)
    scores = torch.full((BATCH, 1, 3), float("nan"), device=device)
    newest = torch.full((BATCH,), 9, device=device)
    assert evict(positions, newest, Stays(), scores=scores).flatten().tolist() == [0] * BATCH


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("dims", [(32, 32), (80, 5), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("seed")
def test_rows_are_written_and_no_other_is(
    device: torch.device, apart: bool, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    from kvlab.kernels.gpu.evict import evict_and_write, write

    heads, capacity = 6, 10
    known = case((BATCH, heads if apart else 1, capacity), "scores" if apart else "age")
    caches = [torch.full((BATCH, capacity, heads, d), float("nan")) for d in dims]
    caches = [x.to(device, dtype).transpose(1, 2) for x in caches]
    rows = [torch.randn(BATCH, 1, kv_heads, d).to(device, dtype).transpose(1, 2) for d in dims]
    expected = [x.cpu().clone() for x in caches]
    found = Case(*(on(device, part) for part in known))
    slots = evict_and_write(*caches, *rows, *found[:3], **found.given)
    wanted = twin.evict_and_write(*expected, *(x.cpu() for x in rows), *known[:3], **known.given)
    assert torch.equal(slots.cpu(), wanted)
    for cache, own in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache.cpu(), own, rtol=0, atol=0, equal_nan=True)
    again = [torch.full_like(x, float("nan")) for x in caches]
    write(*again, *rows, slots)
    for cache, own in zip(again, expected, strict=True):
        torch.testing.assert_close(cache.cpu(), own, rtol=0, atol=0, equal_nan=True)


def test_an_empty_batch(device: torch.device) -> None:
    from kvlab.kernels.gpu.evict import evict

    none = torch.zeros(0, 2, 4, dtype=torch.long, device=device)
    assert evict(none, none[:, 0, 0], Stays()).shape == (0, 2, 1)
