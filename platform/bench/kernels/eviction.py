"""A decode step's eviction: rank the slots, take the lowest, write the new row there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.evict import Stays, evict_and_write
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.kernels.decode import HEADS, Heads, cache_bytes, points
from kvlab.platform.bench.line import Line

GRID = {"cuda": ((32, 128, 1, 512), (1024, 4096, 256)), "cpu": ((2,), (24,))}
SINKS = 4


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure with scores by head, which grow by the key mass (H2O); and by age alone."""
    bench = Bench(device)
    kind = bench.device.type
    heads = HEADS[kind]
    yield from bench.run(
        (
            3 * cache_bytes(heads, batch, rows, dtype),
            partial(step, bench, heads, batch, rows, dtype, scored),
        )
        for batch, rows in points(*GRID[kind])
        for scored in (True, False)
    )


class State:
    """A full cache, its slots' positions and scores, and the row that comes next."""

    def __init__(
        self, bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype, scored: bool
    ) -> None:
        device = bench.device
        shape = (batch, heads.kv, rows, heads.dim)
        row = (batch, heads.kv, 1, heads.dim)
        self.keys, self.values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.k, self.v = (torch.randn(row, device=device, dtype=dtype) for _ in range(2))
        kept = (batch, heads.kv if scored else 1, 2 * rows)
        places = torch.rand(kept, device=device).argsort(-1)[..., :rows]
        self.positions = places.contiguous()
        self.scores = _binary(1 << 20, batch, heads.kv, rows, device) if scored else None
        self.mass = _binary(64, batch, heads.q, rows, device) if scored else None
        self.newest = torch.full((batch,), 2 * rows, device=device)
        self.stays = Stays(torch.full((batch,), rows // 4, device=device), sinks=SINKS)

    def step(self) -> Tensor:
        """Evict and write; return the slots."""
        return evict_and_write(
            self.keys, self.values, self.k, self.v, self.positions, self.newest, self.stays,
            scores=self.scores, mass=self.mass,
        )  # fmt: skip

    def changed(self) -> list[Tensor]:
        """What a step changes."""
        scores = [] if self.scores is None else [self.scores]
        return [self.positions, *scores, self.keys, self.values]

    def restore(self, before: list[Tensor]) -> None:
        """Undo a step."""
        for own, saved in zip(self.changed(), before, strict=True):
            own.copy_(saved)


def _binary(below: int, batch: int, heads: int, rows: int, device: torch.device) -> Tensor:
    """Random float32 [B, H, C] whose sums are exact, so that every order of adding agrees."""
    return torch.randint(below, (batch, heads, rows), device=device).float() / 4096


def step(
    bench: Bench, heads: Heads, batch: int, rows: int, dtype: torch.dtype, scored: bool
) -> Case:
    """One size; the same row comes again and again, and takes another slot each time."""
    state = State(bench, heads, batch, rows, dtype, scored)
    read = sum(x.numel() * x.element_size() for x in state.changed()[:-2])
    mass = state.mass
    weights = 0 if mass is None else mass.numel() * 4 + read // 3  # scores are written back
    return Case(
        "evict and write, " + ("by scores that grow by the key mass" if scored else "by age"),
        {"batch": batch, "rows": rows},
        state.step,
        read + weights + 2 * sum(x.numel() * x.element_size() for x in (state.k, state.v)),
        partial(correct, state),
    )


def correct(state: State) -> str:
    """Three steps in a row: slots, positions, scores and rows must be the twin's."""
    scores = "" if state.scores is None else "scores,"
    names = f"slots,positions,{scores}keys,values"
    for _ in range(3):
        before = [x.clone() for x in state.changed()]
        with poisoned():
            slots = state.step()
        found = [slots, *(x.clone() for x in state.changed())]
        state.restore(before)
        with torch_only():
            exact = state.step()
        wrong = apart(found, [exact, *state.changed()], close=0.0, names=names)
        if wrong:
            return wrong
    return ""
