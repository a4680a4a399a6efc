"""Attention over rows as a cache stores them, against its twin in float64."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule
from kvlab.kernels.attention import attend as twin
from kvlab.kernels.quantise import FLOAT8, quantise_float8, quantise_symmetric, to_float8
from kvlab.kernels.stored import Stored, Turn

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BATCH, HEADS, ROWS, KEYS = 2, 2, 2, 75
SEEN = slice(None)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def encoded(x: Tensor, how: str) -> tuple[Tensor, Tensor | None]:
    if how == "plain":
        return x, None
    if how == "int8":
        return quantise_symmetric(x)
    if how == "unscaled fp8":
        return to_float8(x), None
    codes, scale = quantise_float8(x)
    return (codes.view(torch.uint8) if how == "fp8 bytes" else codes), scale


def operands(
    device: torch.device, dtype: torch.dtype, width: int, how: str, heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor, Stored]:
    """Queries of twice as many heads, keys and values as they are stored."""
    q = torch.randn(BATCH, 2 * heads, ROWS, width, device=device).to(dtype)
    size = torch.rand(BATCH, heads, KEYS, 1, device=device) * 3
    k, v = (
        encoded((torch.randn(BATCH, heads, KEYS, width, device=device) * size).to(dtype), how)
        for _ in range(2)
    )
    return q, k[0], v[0], Stored(k_scale=k[1], v_scale=v[1])


def positions(device: torch.device, *lead: int) -> tuple[Tensor, Tensor]:
    """Of queries, and of keys in no order, a third of them empty."""
    j = torch.rand(*lead, KEYS).argsort(-1)
    j = j.masked_fill(torch.rand(j.shape) < 0.3, EMPTY)
    return torch.randint(KEYS // 2, KEYS, (BATCH, ROWS), device=device), j.to(device)


def turning(places: Tensor, rotary: int) -> Turn:
    rates = 10000.0 ** -(torch.arange(0, rotary, 2, device=places.device) / rotary)
    angles = torch.arange(KEYS + 5, device=places.device)[:, None] * rates
    return Turn(places, angles.cos(), angles.sin())


def as_pool(x: Tensor | None, table: Tensor, rows: int) -> Tensor | None:
    """A pool of NaN, and the rows [B, H_kv, S, n] where `table` says that they are."""
    if x is None:
        return None
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    table = table if table.dim() == 3 else table.unsqueeze(1)
    bits = x.view(torch.uint8) if x.dtype == FLOAT8 else x
    pool = torch.full((rows, x.shape[1], x.shape[-1]), 127, dtype=bits.dtype, device=x.device)
    if pool.is_floating_point():
        pool.fill_(torch.nan)
    pool[table.expand(*x.shape[:3]), heads.expand(x.shape[:3])] = bits
    return pool.view(x.dtype)


def check(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, j: Tensor | None, stored: Stored, rule: Rule,
    parts: int | None = None,
) -> None:  # fmt: skip
    from kvlab.kernels.gpu.attention import attend

    out, mass = attend(q, k, v, p, j, rule, SEEN, stored, parts=parts)
    given = (_exact(x) for x in (q, k, v, p, j))
    exact, shares = twin(*given, rule, SEEN, stored=_exact(stored))
    close = TOLERANCE[q.dtype]
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double().cpu(), exact, rtol=close, atol=close)
    assert mass is not None
    assert shares is not None
    close = max(close / 4, 1e-5)  # int8 and rotated keys are rounded in another order
    torch.testing.assert_close(mass.cpu(), shares, rtol=close, atol=close)


def _exact(x: Any) -> Any:
    """On the CPU, where twins run, numbers in float64 and codes as they are."""
    if isinstance(x, Stored | Turn):
        return replace(x, **{f.name: _exact(getattr(x, f.name)) for f in fields(x)})
    if not isinstance(x, Tensor):
        return x
    x = x.cpu()
    return x.double() if x.is_floating_point() and x.dtype != FLOAT8 else x


@pytest.mark.parametrize("how", ["plain", "int8", "fp8", "fp8 bytes", "unscaled fp8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_codes(device: torch.device, seed: int, dtype: torch.dtype, how: str) -> None:
    q, k, v, stored = operands(device, dtype, 64, how)
    p, j = positions(device, BATCH)
    check(q, k, v, p, j, stored, Rule(window=40, sinks=2), parts=random.choice([1, 2]))


def test_every_8_bit_float_is_read(device: torch.device) -> None:
    """Query t reads row t alone, so that the output is the row."""
    from kvlab.kernels.gpu.attention import attend

    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes[codes.view(FLOAT8).float().isnan()] = 0
    v = codes.view(1, 1, 16, 16)
    places = torch.arange(16, device=device).unsqueeze(0)
    for dtype in TOLERANCE:
        q = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device)
        out, _ = attend(q, v, v, places, places, Rule(window=1))
        assert torch.equal(out.float(), v.view(FLOAT8).float())


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("how", ["plain", "int8", "fp8"])
def test_rows_of_a_pool(device: torch.device, seed: int, how: str, by_head: bool) -> None:
    q, k, v, stored = operands(device, torch.bfloat16, 32, how, heads=3)
    lead = (BATCH, 3) if by_head else (BATCH,)
    p, j = positions(device, *lead)
    rows = BATCH * KEYS + 20
    order = torch.randperm(rows, device=device)[: BATCH * KEYS].view(BATCH, -1)
    table = order
    if by_head:
        table = torch.stack([order[:, torch.randperm(KEYS)] for _ in range(3)], dim=1)
    pools = [as_pool(x, table, rows) for x in (k, v, stored.k_scale, stored.v_scale)]
    k_pool, v_pool, k_scale, v_scale = pools
    assert k_pool is not None
    assert v_pool is not None
    table = table.masked_fill(j == EMPTY, rows + 1000)  # numbers of no row: they are not followed
    paged = Stored(k_scale, v_scale, table.int() if by_head else table)
    from kvlab.kernels.gpu.attention import attend

    out, mass = attend(q, k_pool, v_pool, p, j, Rule(), SEEN, paged, parts=2)
    same, weights = attend(q, k, v, p, j, Rule(), SEEN, stored, parts=2)
    torch.testing.assert_close(out, same, rtol=0, atol=0)
    torch.testing.assert_close(mass, weights, rtol=0, atol=0)
    paged = replace(paged, table=table.masked_fill(j == EMPTY, int(order[0, 0])))
    if how == "plain":  # the twin reads what is empty before it masks it
        k_pool, v_pool = k_pool.nan_to_num(), v_pool.nan_to_num()
    check(q, k_pool, v_pool, p, j, paged, Rule())


@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (64, 16), (48, 48), (80, 32)])
@pytest.mark.parametrize("how", ["plain", "int8", "fp8"])
def test_keys_kept_unrotated(
    device: torch.device, seed: int, width: int, rotary: int, how: str
) -> None:
    dtype = random.choice(list(TOLERANCE)) if how == "plain" else torch.bfloat16
    q, k, v, stored = operands(device, dtype, width, how)
    by_head = seed % 2 == 0
    p, j = positions(device, *((BATCH, HEADS) if by_head else (BATCH,)))
    empty = (j == EMPTY).sum(-1, keepdim=True)
    standing = (j.argsort(-1).argsort(-1) - empty).clamp_min(-1)
    stored = replace(stored, turn=turning(standing, rotary))
    check(q, k, v, p, j, stored, Rule(window=60, sinks=4), parts=random.choice([1, 3]))


@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_lengths(device: torch.device, seed: int, positioned: bool, by_head: bool) -> None:
    q, k, v, stored = operands(device, torch.float32, 32, "plain")
    lengths = torch.randint(0, KEYS + 1, (BATCH, HEADS) if by_head else (BATCH,), device=device)
    lengths[0] = 0
    p, j = positions(device, BATCH)
    stored = replace(stored, lengths=lengths)
    check(q, k, v, p, j if positioned else None, stored, Rule(), parts=2)


def test_all_at_once(device: torch.device, seed: int) -> None:
    q, k, v, stored = operands(device, torch.bfloat16, 64, "int8")
    p, j = positions(device, BATCH, HEADS)
    table = torch.randperm(BATCH * KEYS, device=device).view(BATCH, KEYS)
    pools = [as_pool(x, table, BATCH * KEYS) for x in (k, v, stored.k_scale, stored.v_scale)]
    k_pool, v_pool, k_scale, v_scale = pools
    assert k_pool is not None
    assert v_pool is not None
    lengths = torch.tensor([KEYS - 9, KEYS], device=device)
    whole = Stored(k_scale, v_scale, table, lengths, turning(j, 32))
    check(q, k_pool, v_pool, p, j, whole, Rule(strict=True, window=50, sinks=3), parts=2)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("k_scale", {"k_scale": torch.zeros(2, 2, 9)}),
    ("v_scale", {"v_scale": torch.zeros(2, 1, 9, 1)}),
    ("lengths: must be .*found .3", {"lengths": torch.zeros(3).long()}),
    ("lengths: must be int32", {"lengths": torch.zeros(2)}),
    ("k: must be", {"table": torch.zeros(2, 9).long()}),
    ("turn.cos", {"turn": Turn(torch.zeros(2, 9).long(), torch.zeros(9, 9), torch.zeros(9, 9))}),
    ("turn.sin", {"turn": Turn(torch.zeros(2, 9).long(), torch.zeros(9, 8), torch.zeros(9, 4))}),
    ("turn.pos", {"turn": Turn(torch.zeros(2, 8).long(), torch.zeros(9, 8), torch.zeros(9, 8))}),
]


@pytest.mark.parametrize(("message", "change"), REFUSED, ids=[m for m, _ in REFUSED])
def test_what_does_not_fit_is_refused(
    device: torch.device, message: str, change: dict[str, Any]
) -> None:
    from kvlab.kernels.gpu.attention import attend

    q, k = torch.zeros(2, 4, 1, 16, device=device), torch.zeros(2, 2, 9, 16, device=device)
    change = {
        name: replace(x, **{f.name: getattr(x, f.name).to(device) for f in fields(x)})
        if isinstance(x, Turn)
        else x.to(device)
        for name, x in change.items()
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        attend(q, k, k, torch.zeros(2, 1, device=device).long(), None, stored=Stored(**change))


def test_a_pool_whose_rows_have_gaps_is_refused(device: torch.device) -> None:
    """A copy of it would be one of all requests."""
    from kvlab.kernels.gpu.attention import attend

    q, pool = torch.zeros(1, 2, 1, 16, device=device), torch.zeros(9, 2, 32, device=device)
    table = torch.zeros(1, 4, device=device).long()
    with pytest.raises(ValueError, match=r"^v: numbers of a pool's row"):
        attend(q, pool[..., :16], pool[..., ::2], table[:, :1], table, stored=Stored(table=table))
