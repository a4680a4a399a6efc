"""A prompt's attention with the mass its keys receive: of the last queries (SnapKV), of all (H2O).

Torch's attention does not give the mass: it stands beside for its time alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.attention import attend
from kvlab.kernels.choice import torch_only
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned, sdpa
from kvlab.platform.bench.kernels.decode import HEADS, Heads
from kvlab.platform.bench.line import Line

GRID = {
    "cuda": ((8, 2048), (1, 8192), (32, 512), (1, 2048), (1, 32768)),
    "cpu": ((2, 24),),
}
"""Batch and tokens of the prompts."""
VOTERS = {"cuda": 32, "cpu": 8}
MOST_WEIGHED = 1 << 26
"""Queries times keys of a head up to which all queries' mass is asked for: the twin's time."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure with the mass of the last queries, then of all."""
    bench = Bench(device)
    kind = bench.device.type
    heads = HEADS[kind]
    yield from bench.run(
        (
            8 * batch * heads.q * tokens * heads.dim * dtype.itemsize,
            partial(prompt, bench, heads, batch, tokens, voters, dtype),
        )
        for batch, tokens in GRID[kind]
        for voters in (VOTERS[kind], tokens)
        if voters * tokens <= MOST_WEIGHED
    )


def prompt(
    bench: Bench, heads: Heads, batch: int, tokens: int, voters: int, dtype: torch.dtype
) -> Case:
    """One size: packed rows, causal, the mass of the last `voters` queries."""
    q = torch.randn(batch, heads.q, tokens, heads.dim, device=bench.device, dtype=dtype)
    k, v = (
        torch.randn(batch, heads.kv, tokens, heads.dim, device=bench.device, dtype=dtype)
        for _ in range(2)
    )
    rows = slice(tokens - voters, tokens)
    ours = partial(attend, q, k, v, None, None, mass_rows=rows)
    rivals = {f"{name}, without the mass": way for name, way in sdpa(q, k, v, causal=True).items()}
    read = voters * (tokens - voters / 2)  # keys that the voters may read
    return Case(
        "prefill attention with key mass",
        {"batch": batch, "tokens": tokens, "voters": voters},
        ours,
        sum(x.numel() * x.element_size() for x in (q, q, k, v)),
        partial(correct, q, k, v, rows),
        flops=2.0 * batch * heads.q * heads.dim * (tokens**2 + read),
        rivals=rivals,
    )


def correct(q: Tensor, k: Tensor, v: Tensor, rows: slice) -> str:
    """Compare two heads' outputs of the last sample, and their mass, with the exact ones."""
    with poisoned():
        out, mass = attend(q, k, v, None, None, mass_rows=rows)
    assert mass is not None
    for name, x in (("output", out), ("key mass", mass)):
        if not bool(x.isfinite().all()):
            return f"{name}: not all are numbers"
    group = q.shape[1] // k.shape[1]
    last = slice(q.shape[1] - group, None)
    own = (q[-1:, last].float(), k[-1:, -1:].float(), v[-1:, -1:].float())
    with torch_only():
        wanted, weights = attend(*own, None, None, mass_rows=rows)
    assert weights is not None
    return apart([out[-1:, last], mass[-1:, last]], [wanted, weights], names="output,key mass")
