"""A decode step's attention over rows as they are stored: in fewer bits, a pool's, unrotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from kvlab.kernels.attention import attend
from kvlab.kernels.choice import torch_only
from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.quantise import FLOAT8
from kvlab.kernels.stored import Stored, Turn
from kvlab.platform.bench.kernels.case import Bench, Case, sdpa
from kvlab.platform.bench.kernels.decode import (
    HEADS,
    HELD,
    KEPT,
    Heads,
    agrees,
    cache_bytes,
    keys_values,
    now,
    points,
    queries,
    traffic,
)
from kvlab.platform.bench.line import Line

GRID = {"cuda": ((32, 128, 1), (4096, 1024, 32768, 256)), "cpu": ((2,), (24,))}
GROUP, RECENT = 32, 128
"""KIVI's: numbers of a group, and rows that stay as they are."""
Maker = Callable[[Bench, Heads, int, int, torch.dtype], Case]


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure every way of storing at one size before the next."""
    bench = Bench(device)
    heads = HEADS[bench.device.type]
    makers: tuple[tuple[float, Maker], ...] = (
        (1.5, partial(coded, code=torch.int8)),
        (1.5, partial(coded, code=FLOAT8)),
        (2.0, partial(grouped, bits=4)),
        (2.0, partial(grouped, bits=2)),
        (1.0 / KEPT, paged),
        (2.0, rotated),
    )
    yield from bench.run(
        (
            int(times * cache_bytes(heads, batch, rows, dtype)),
            partial(make, bench, heads, batch, rows, dtype),
        )
        for batch, rows in points(*GRID[bench.device.type])
        for times, make in makers
    )


def coded(
    bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype, *, code: torch.dtype
) -> Case:
    """Codes of 8 bits with a scale for each row, beside torch's attention on 16-bit rows."""
    q = queries(bench, heads, batch, dtype)
    shape = (batch, heads.kv, rows, heads.dim)
    if code == torch.int8:
        k, v = (torch.randint(-127, 128, shape, dtype=code, device=bench.device) for _ in range(2))
        size = 1 / 73  # so that a row's numbers have a variance of about 1
    else:
        k, v = (torch.randn(shape, device=bench.device, dtype=dtype).to(code) for _ in range(2))
        size = 1.0
    k_scale, v_scale = (
        (size * (0.75 + torch.rand(*shape[:3], 1, device=bench.device) / 2)).to(dtype)
        for _ in range(2)
    )
    wide = keys_values(bench, heads, batch, rows, dtype)
    name = "int8" if code == torch.int8 else "fp8"
    return case_of(
        f"decode attention, {name}",
        {"batch": batch, "rows": rows},
        (q, k, v),
        Stored(k_scale, v_scale),
        traffic(q, k, v, k_scale, v_scale),
        sdpa_on(q, *wide, "16-bit rows"),
    )


def grouped(
    bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype, *, bits: int
) -> Case:
    """KIVI's rows, beside torch's attention on 16-bit rows that they were decoded to."""
    q = queries(bench, heads, batch, dtype)
    k, v = keys_values(bench, heads, batch, min(RECENT, rows // 2), dtype)
    width, device = min(GROUP, heads.dim), bench.device
    newest = torch.arange(rows - k.shape[2], rows, dtype=torch.int32, device=device)

    def of(shape: tuple[int, ...], one: tuple[int, ...]) -> Groups:
        """Random codes and scales of numbers whose variance is about 1."""
        lead, most = (batch, heads.kv), 2**bits - 1
        codes = torch.randint(0, 256, (*lead, *shape), dtype=torch.uint8, device=device)
        scale = 0.75 + torch.rand(*lead, *one, device=device) / 2
        scale = (scale * sqrt(12 / (most * (most + 2)))).to(dtype)
        return Groups(codes, scale, scale * (-most / 2), newest.expand(*lead, -1))

    many, blocks = -(-rows // GROUP), heads.dim // width
    keys = of((many, GROUP * bits // 8, heads.dim), (many, 1, heads.dim))
    values = of((rows, blocks, width * bits // 8), (rows, blocks, 1))
    kept = Stored(few=FewBits(bits, keys, values))
    parts = (part for x in (keys, values) for part in (x.codes, x.scale, x.low))
    return case_of(
        f"decode attention, {bits} bits",
        {"batch": batch, "rows": rows},
        (q, k, v),
        kept,
        traffic(q, k, v, *parts),
        sdpa_on(q, *kept.rows(k, v, dtype), "decoded rows"),
    )


def paged(bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> Case:
    """A fifth of a pool's rows, by their numbers and scattered; the twin gathers them first."""
    q = queries(bench, heads, batch, dtype)
    total = round(batch * rows / KEPT / 2)
    k, v = (
        torch.randn(total, heads.kv, heads.dim, device=bench.device, dtype=dtype) for _ in range(2)
    )
    table = torch.randperm(total, device=bench.device)[: batch * rows].view(batch, rows)
    return case_of(
        "decode attention, rows of a pool",
        {"batch": batch, "rows": rows},
        (q, k, v),
        Stored(table=table),
        traffic(q, table) + cache_bytes(heads, batch, rows, dtype),
        {},
    )


def rotated(bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> Case:
    """Keys that are kept unrotated, beside torch's attention on rotated ones."""
    q = queries(bench, heads, batch, dtype)
    k, v = keys_values(bench, heads, batch, rows, dtype)
    half = heads.dim // 2
    angles = torch.arange(rows).unsqueeze(1) * 10000 ** (-torch.arange(half) / half)
    places = torch.stack([torch.randperm(rows) for _ in range(min(batch, 32))])
    places = places.repeat(-(-batch // len(places)), 1)[:batch].to(bench.device)
    turn = Turn(places, angles.cos().to(bench.device), angles.sin().to(bench.device))
    return case_of(
        "decode attention, unrotated keys",
        {"batch": batch, "rows": rows},
        (q, k, v),
        Stored(turn=turn),
        traffic(q, k, v, places, turn.cos, turn.sin),
        sdpa_on(q, k, v, "rotated rows"),
    )


def case_of(
    kernel: str,
    point: dict[str, int],
    given: tuple[Tensor, Tensor, Tensor],
    stored: Stored,
    moved: int,
    rivals: dict[str, Callable[[], object]],
) -> Case:
    """A case of rows as they lie."""
    q, k, v = given
    ours = partial(attend, q, k, v, now(q), None, stored=stored)
    return Case(
        kernel,
        point,
        lambda: ours()[0],
        moved,
        partial(agrees, lambda: [ours()[0]], q, partial(exact, q, k, v, stored)),
        rivals=rivals,
        held=point["batch"] >= HELD,
    )


def sdpa_on(q: Tensor, k: Tensor, v: Tensor, what: str) -> dict[str, Callable[[], object]]:
    """Torch's attention in every way, named after what it reads."""
    return {f"{name}, {what}": way for name, way in sdpa(q, k, v).items()}


def exact(q: Tensor, k: Tensor, v: Tensor, stored: Stored, at: list[int]) -> list[Tensor]:
    """What the twin answers for some samples in float32, from the codes and scales as they are."""
    turn, table, few = stored.turn, stored.table, stored.few
    if few is not None:
        own = FewBits(few.bits, *(of_some(x, at) for x in (few.keys, few.values)))
        k, v = (x.float() for x in own.rows(k[at], v[at]))
        kept = Stored()
    elif table is not None:
        k, v = (x[table[at].flatten()].float() for x in (k, v))
        kept = Stored(table=torch.arange(len(k), device=k.device).view(len(at), -1))
    else:
        k_scale, v_scale = (
            None if x is None else x[at].float() for x in (stored.k_scale, stored.v_scale)
        )
        turned = None if turn is None else Turn(turn.positions[at], turn.cos, turn.sin)
        if k.dtype == FLOAT8:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        k, v, kept = k[at], v[at], Stored(k_scale, v_scale, turn=turned)
        if k.dtype == q.dtype:
            k, v = k.float(), v.float()
    with torch_only():
        return [attend(q[at].float(), k, v, now(q[at]), None, stored=kept)[0]]


def of_some(groups: Groups, at: list[int]) -> Groups:
    """The groups of some samples."""
    return Groups(groups.codes[at], groups.scale[at], groups.low[at], groups.slots[at])
