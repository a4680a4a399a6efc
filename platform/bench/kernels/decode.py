"""A decode step's attention over a dense cache: alone, with the key mass, and beside a full cache.

32 query heads over 8 KV heads of 128 numbers; every row may be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.attention import attend
from kvlab.kernels.choice import torch_only
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned, sdpa, some
from kvlab.platform.bench.line import Line


class Heads(NamedTuple):
    """Query heads, KV heads and their size."""

    q: int
    kv: int
    dim: int


HEADS = {"cuda": Heads(32, 8, 128), "cpu": Heads(4, 2, 16)}
GRID: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cuda": ((32, 128, 8, 1, 512), (4096, 1024, 256, 32768, 64)),
    "cpu": ((2,), (24,)),
}
"""Batches and rows of a KV layer, the most telling first."""
WEIGHED = {"cuda": ((32, 128, 1), (1024, 4096, 256)), "cpu": ((2,), (24,))}
FIRST = 12
"""Points of the grid that come before the other measurements."""
HELD = 32
"""The batch from which on the bandwidth target holds."""
KEPT = 0.2
"""Share of a full cache that an evicted one keeps."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure the grid's first half, the key mass, what an eviction saves, and the other half."""
    bench = Bench(device)
    kind = bench.device.type
    heads = HEADS[kind]
    whole = list(points(*GRID[kind]))
    parts = (
        (dense, 1.0, whole[:FIRST]),
        (weighed, 1.0, points(*WEIGHED[kind])),
        (evicted, 1.5 / KEPT, points(*WEIGHED[kind])),
        (dense, 1.0, whole[FIRST:]),
    )
    yield from bench.run(
        (
            int(times * cache_bytes(heads, batch, rows, dtype)),
            partial(make, bench, heads, batch, rows, dtype),
        )
        for make, times, grid in parts
        for batch, rows in grid
    )


def points(batches: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The grid from its first corner on, so that a time limit cuts off what tells least."""
    found = [(b, r) for b in range(len(batches)) for r in range(len(rows))]
    for b, r in sorted(found, key=lambda place: (sum(place), place)):
        yield batches[b], rows[r]


def cache_bytes(heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> int:
    """Of the keys and values of one KV layer."""
    return 2 * batch * heads.kv * rows * heads.dim * dtype.itemsize


def queries(bench: Bench, heads: Heads, batch: int, dtype: torch.dtype) -> Tensor:
    """One query of every sample [B, H, 1, D]."""
    return torch.randn(batch, heads.q, 1, heads.dim, device=bench.device).to(dtype)


def keys_values(
    bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Random keys and values [B, H_kv, S, D]."""
    shape = (batch, heads.kv, rows, heads.dim)
    k, v = (torch.randn(shape, device=bench.device, dtype=dtype) for _ in range(2))
    return k, v


def now(q: Tensor) -> Tensor:
    """Positions [B, 1] of queries that come after all rows."""
    return torch.full((len(q), 1), 1 << 20, device=q.device)


def dense(bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> Case:
    """Attention alone, beside torch's on the same rows."""
    q = queries(bench, heads, batch, dtype)
    k, v = keys_values(bench, heads, batch, rows, dtype)
    ours = partial(attend, q, k, v, now(q), None)
    return Case(
        "decode attention",
        {"batch": batch, "rows": rows},
        lambda: ours()[0],
        traffic(q, k, v),
        partial(agrees, lambda: [ours()[0]], q, lambda at: exact(q, k, v, at)[:1]),
        rivals=sdpa(q, k, v),
        held=batch >= HELD,
    )


def weighed(bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> Case:
    """Attention and the key mass, beside torch's attention without it."""
    q = queries(bench, heads, batch, dtype)
    k, v = keys_values(bench, heads, batch, rows, dtype)
    ours: Callable[[], Any] = partial(attend, q, k, v, now(q), None, mass_rows=slice(0, 1))
    rivals = {f"{name}, without the mass": way for name, way in sdpa(q, k, v).items()}
    return Case(
        "decode attention with key mass",
        {"batch": batch, "rows": rows},
        ours,
        # The keys are read a second time, once the log-sum-exp is known; the mass is float32.
        traffic(q, k, k, v) + 4 * batch * heads.q * rows,
        partial(agrees, ours, q, lambda at: exact(q, k, v, at, mass=True), "output,key mass"),
        rivals=rivals,
        held=batch >= HELD,
    )


def evicted(bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype) -> Case:
    """A cache of which a fifth stayed, beside the full cache, and that fifth gathered each step."""
    full = round(rows / KEPT)
    q = queries(bench, heads, batch, dtype)
    k, v = keys_values(bench, heads, batch, full, dtype)
    chosen = torch.rand(batch, heads.kv, full, device=bench.device).argsort(-1)[..., :rows]
    index = chosen.sort(-1).values.unsqueeze(-1).expand(-1, -1, -1, heads.dim)
    kept_k, kept_v = k.gather(2, index), v.gather(2, index)

    def gathered(attention: Callable[..., object]) -> object:
        return attention(q, k.gather(2, index), v.gather(2, index))

    ours = partial(attend, q, kept_k, kept_v, now(q), None)
    rivals = {f"{name}, full cache": way for name, way in sdpa(q, k, v).items()}
    grouped = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    rivals["torch SDPA, gathered each step"] = partial(gathered, grouped)
    return Case(
        "decode attention after eviction",
        {"batch": batch, "rows": rows, "rows before": full},
        lambda: ours()[0],
        traffic(q, kept_k, kept_v),
        partial(agrees, lambda: [ours()[0]], q, lambda at: exact(q, kept_k, kept_v, at)[:1]),
        rivals=rivals,
        held=batch >= HELD,
    )


def traffic(q: Tensor, *read: Tensor) -> int:
    """Bytes of a query, of an output like it, and of what is read."""
    return sum(x.numel() * x.element_size() for x in (q, q, *read))


def exact(q: Tensor, k: Tensor, v: Tensor, at: list[int], mass: bool = False) -> list[Tensor]:
    """What the twin answers in float32 for some samples."""
    q, k, v = (x[at].float() for x in (q, k, v))
    with torch_only():
        out, weights = attend(q, k, v, now(q), None, mass_rows=slice(0, 1) if mass else None)
    return [out] if weights is None else [out, weights]


def agrees(
    ours: Callable[[], Sequence[Tensor]],
    q: Tensor,
    wanted: Callable[[list[int]], list[Tensor]],
    names: str = "output",
) -> str:
    """Compare some samples of a call with the exact answers; all of them must be numbers."""
    with poisoned():
        found = list(ours())
    for name, x in zip(names.split(","), found, strict=True):
        if not bool(x.isfinite().all()):
            return f"{name}: not all are numbers"
    at = some(len(q))
    return apart([x[at] for x in found], wanted(at), names=names)
