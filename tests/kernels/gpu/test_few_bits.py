"""Attention over rows in few bits, against attention in float64 over what they stand for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule
from kvlab.kernels.attention import attend as twin
from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.quantise import pack, quantise
from kvlab.kernels.stored import Stored, Turn

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BATCH, HEADS, KEYS = 2, 2, 75
NOWHERE = torch.iinfo(torch.int32).max
SEEN = slice(None)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ANY = Rule(window=10**6)


def groups(codes: Tensor, scale: Tensor, low: Tensor, recent: Tensor, rows: int) -> Groups:
    """A part of larger tensors, and recent rows in any slots, in none, and beyond the last.

    Those of no slot are NaN.
    """
    lead, length = recent.shape[:2], recent.shape[2]
    slots = torch.rand(*lead, max(rows, length) + 9, device=recent.device).argsort(-1)
    slots = slots[..., :length].to(torch.int32)
    slots = slots.masked_fill(torch.rand(slots.shape, device=slots.device) < 0.2, NOWHERE)
    recent.masked_fill_((slots >= rows).unsqueeze(-1), torch.nan)
    return Groups(codes, scale, low, slots)


def operands(
    device: torch.device, dtype: torch.dtype, width: int, bits: int, group: int,
    *, heads: int = HEADS, per: int = 2, queries: int = 2, recent: tuple[int, int] = (16, 25),
) -> tuple[Tensor, Tensor, Tensor, Stored]:  # fmt: skip
    """Queries, recent rows, and how the others lie; `per` query heads read a KV head."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(BATCH, heads, *shape, device=device).mul_(2).add_(0.5).to(dtype)

    q = torch.randn(BATCH, per * heads, queries, width, device=device).to(dtype)
    k, v = (numbers(length, width) for length in recent)
    many = -(-KEYS // group)
    codes, *rest = quantise(numbers(many + 2, group, width), bits, -2)
    parts = (x[:, :, :many] for x in (pack(codes, bits, -2), *rest))
    keys = groups(*parts, k, KEYS)
    channels = min(group, width)
    codes, *rest = quantise(numbers(KEYS + 1, width // channels, channels), bits, -1)
    parts = (x[:, :, :KEYS] for x in (pack(codes, bits, -1), *rest))
    return q, k, v, Stored(few=FewBits(bits, keys, groups(*parts, v, KEYS)))


def positions(device: torch.device, queries: int, *lead: int) -> tuple[Tensor, Tensor]:
    """Of queries, and of keys in no order, a third of them empty."""
    j = torch.rand(*lead, KEYS).argsort(-1)
    j = j.masked_fill(torch.rand(j.shape) < 0.3, EMPTY)
    return torch.randint(KEYS // 2, KEYS, (BATCH, queries), device=device), j.to(device)


def check(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, j: Tensor | None, stored: Stored, rule: Rule = ANY,
    parts: int | None = None,
) -> None:  # fmt: skip
    from kvlab.kernels.gpu.attention import attend

    out, mass = attend(q, k, v, p, j, rule, SEEN, stored, parts=parts)
    shown = (x.double().cpu() for x in Stored(few=stored.few).rows(k, v, q.dtype))
    turn, lengths = stored.turn, stored.lengths
    if turn is not None:
        turn = Turn(turn.positions.cpu(), turn.cos.double().cpu(), turn.sin.double().cpu())
    rest = Stored(lengths=None if lengths is None else lengths.cpu(), turn=turn)
    places = (None if x is None else x.cpu() for x in (p, j))
    exact, shares = twin(q.double().cpu(), *shown, *places, rule, SEEN, stored=rest)
    close = TOLERANCE[q.dtype]
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double().cpu(), exact, rtol=close, atol=close)
    assert mass is not None
    assert shares is not None
    # Keys are rounded as the twin rounds them, but once more where they are rotated.
    close = 2e-5 if turn is None else max(close / 4, 1e-5)
    torch.testing.assert_close(mass.cpu(), shares, rtol=close, atol=close)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_codes(device: torch.device, seed: int, dtype: torch.dtype, bits: int) -> None:
    q, k, v, stored = operands(device, dtype, 64, bits, 32)
    p, j = positions(device, 2, BATCH, HEADS)
    check(q, k, v, p, j, stored, Rule(window=40, sinks=2), random.choice([1, 2]))


SIZES = [(32, 8, 1), (48, 24, 4), (80, 40, 2), (20, 32, 8), (6, 128, 2), (128, 64, 1), (96, 96, 3)]


@pytest.mark.parametrize(("width", "group", "per"), SIZES)
def test_sizes(device: torch.device, seed: int, width: int, group: int, per: int) -> None:
    """Groups that are not whole blocks of keys, or larger than a head; odd heads; few queries."""
    bits, dtype = random.choice([2, 4]), random.choice(list(TOLERANCE))
    print(bits, dtype)
    queries = random.choice([1, 3])
    q, k, v, stored = operands(device, dtype, width, bits, group, per=per, queries=queries)
    p, j = positions(device, queries, BATCH)
    check(q, k, v, p, j, stored, Rule(strict=True), random.choice([1, 3]))


@pytest.mark.parametrize("recent", [(1, 1), (200, 201), (8, 90)])
def test_recent_rows(device: torch.device, seed: int, recent: tuple[int, int]) -> None:
    """More than there are slots, and of keys other ones than of values; every slot is read."""
    q, k, v, stored = operands(device, torch.float32, 32, 2, 32, recent=recent)
    p = torch.full((BATCH, 2), KEYS, device=device)
    check(q, k, v, p, None, stored, parts=2)


def test_values_come_out_as_they_are_decoded(device: torch.device, seed: int) -> None:
    """Query t reads row t alone, so that the output is the row, bit for bit."""
    from kvlab.kernels.gpu.attention import attend

    for dtype in TOLERANCE:
        for bits, width in ((2, 64), (4, 48)):
            _, k, v, stored = operands(device, dtype, width, bits, 16)
            places = torch.arange(KEYS, device=device).unsqueeze(0)
            q = torch.zeros(BATCH, HEADS, KEYS, width, dtype=dtype, device=device)
            out, _ = attend(q, k, v, places, places, Rule(window=1), stored=stored)
            assert torch.equal(out, stored.rows(k, v, dtype)[1])


@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (64, 16), (48, 48)])
@pytest.mark.parametrize("bits", [2, 4])
def test_keys_kept_unrotated(
    device: torch.device, seed: int, width: int, rotary: int, bits: int
) -> None:
    dtype = random.choice(list(TOLERANCE))
    q, k, v, stored = operands(device, dtype, width, bits, 16)
    p, j = positions(device, 2, *((BATCH, HEADS) if seed % 2 else (BATCH,)))
    empty = (j == EMPTY).sum(-1, keepdim=True)
    standing = (j.argsort(-1).argsort(-1) - empty).clamp_min(-1)
    rates = 10000.0 ** -(torch.arange(0, rotary, 2, device=device) / rotary)
    angles = torch.arange(KEYS + 5, device=device)[:, None] * rates
    stored = replace(stored, turn=Turn(standing, angles.cos(), angles.sin()))
    check(q, k, v, p, j, stored, Rule(window=60, sinks=4), random.choice([1, 3]))


def test_groups_that_were_never_written(device: torch.device, seed: int) -> None:
    """Their scale is below 0, and their slots are empty but where a recent row stands."""
    q, k, v, stored = operands(device, torch.bfloat16, 32, 4, 16)
    assert stored.few is not None
    keys = stored.few.keys
    keys.scale[:, :, 2:] = -1
    keys.codes[:, :, 2:] = 0
    p = torch.full((BATCH, 2), KEYS, device=device)
    j = torch.arange(KEYS, device=device).expand(BATCH, HEADS, KEYS)
    held = (keys.slots.unsqueeze(-1) == j.unsqueeze(2)).any(2)
    check(q, k, v, p, j.masked_fill((j >= 32) & ~held, EMPTY), stored, parts=2)


def test_lengths(device: torch.device, seed: int) -> None:
    q, k, v, stored = operands(device, torch.float32, 32, 4, 16)
    lengths = torch.tensor([0, random.randrange(KEYS)], device=device)
    p = torch.full((BATCH, 2), KEYS, device=device)
    check(q, k, v, p, None, replace(stored, lengths=lengths), parts=2)


def test_no_row_is_written_by_reading(device: torch.device, seed: int) -> None:
    """Neither the codes nor what stands beside them."""
    from kvlab.kernels.gpu.attention import attend

    q, k, v, stored = operands(device, torch.float32, 32, 4, 16)
    few = stored.few
    assert few is not None
    kept = [k, v, *(getattr(of, part) for of in (few.keys, few.values) for part in of.__slots__)]
    before = [x.clone() for x in kept]
    p, j = positions(device, 2, BATCH)
    attend(q, k, v, p, j, ANY, SEEN, stored)
    for x, same in zip(kept, before, strict=True):
        assert torch.equal(x.nan_to_num(), same.nan_to_num())


def fits() -> tuple[Tensor, Tensor, Stored]:
    """Two samples, two heads of 16 numbers, 9 rows in groups of 8, and 5 recent ones."""
    of = (torch.zeros(2, 2, 2, 4, 16, dtype=torch.uint8), *torch.zeros(2, 2, 2, 2, 1, 16).unbind(0))
    keys = Groups(*of, torch.zeros(2, 2, 5, dtype=torch.int32))
    of = (torch.zeros(2, 2, 9, 2, 4, dtype=torch.uint8), *torch.zeros(2, 2, 2, 9, 2, 1).unbind(0))
    values = Groups(*of, torch.zeros(2, 2, 5, dtype=torch.int32))
    return torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 5, 16), Stored(few=FewBits(4, keys, values))


OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("few.bits: must be 2 or 4, found 3", "", {"bits": 3}),
    ("few.keys.codes: 2 groups of 4 slots", "keys", {"codes": torch.zeros(2, 2, 2, 2, 16).byte()}),
    ("few.keys.codes: must have 5", "keys", {"codes": torch.zeros(2, 2, 8, 16).byte()}),
    ("few.keys.codes: must be torch.uint8", "keys", {"codes": torch.zeros(2, 2, 2, 4, 16)}),
    ("few.keys.codes: a row must be without gaps", "keys",
     {"codes": torch.zeros(2, 2, 2, 16, 4).byte().mT}),
    ("few.keys.scale: must be", "keys", {"scale": torch.zeros(2, 2, 2, 1, 16).half()}),
    ("few.keys.slots: must be", "keys", {"slots": torch.zeros(2, 2, 6).int()}),
    ("few.values.codes: 3 groups", "values", {"codes": torch.zeros(2, 2, 9, 3, 4).byte()}),
    ("few.values.codes: 16 groups", "values", {"codes": torch.zeros(2, 2, 9, 16, 1).byte()}),
    ("few.values.codes: must be", "values", {"codes": torch.zeros(2, 2, 9, 2, 3).byte()}),
    ("few.values.low: must be", "values", {"low": torch.zeros(2, 2, 9, 1, 1)}),
    ("few.values.slots: must be", "values", {"slots": torch.zeros(2, 2, 5)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "of", "change"), OTHERS, ids=[m for m, *_ in OTHERS])
def test_what_does_not_fit_is_refused(message: str, of: str, change: dict[str, Any]) -> None:
    from kvlab.kernels.gpu.attention import attend

    q, k, stored = fits()
    few = stored.few
    assert few is not None
    change = {of: replace(getattr(few, of), **change)} if of else change
    with pytest.raises(ValueError, match=f"^{message}"):
        attend(q, k, k, torch.zeros(2, 1).long(), None, stored=Stored(few=replace(few, **change)))


@pytest.mark.parametrize("name", ["k_scale", "v_scale", "table"])
def test_rows_in_few_bits_lie_in_no_other_way(name: str) -> None:
    from kvlab.kernels.gpu.attention import attend

    q, k, stored = fits()
    with pytest.raises(ValueError, match=f"^{name}: rows in few bits have none"):
        attend(q, k, k, torch.zeros(2, 1).long(), None, stored=replace(stored, **{name: q}))
    with pytest.raises(ValueError, match=r"^k, v: must be torch\.float32, the same"):
        attend(q, k.char(), k.char(), torch.zeros(2, 1).long(), None, stored=stored)
