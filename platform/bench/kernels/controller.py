"""The step of ADORE's controller: a token is taken in, and all tokens so far are scored."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvlab.kernels.adore import advance, score
from kvlab.kernels.choice import torch_only
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.line import Line

TOKENS = {"cuda": 2048, "cpu": 24}
GRID = {"cuda": ((32, 1), (1, 1), (64, 1), (8, 1), (32, 32)), "cpu": ((3, 1), (2, 2))}
"""Batch, and the KV layers that are scored each for itself; 1: all alike, as in the paper."""


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure a controller of the default sizes, untrained; the dtype is what it keeps."""
    bench = Bench(device)
    tokens = TOKENS[bench.device.type]
    yield from bench.run(
        (
            4 * batch * tokens * (layers + ControllerConfig(1, 1).remembered),
            partial(make, bench, batch, layers, tokens, dtype),
        )
        for batch, layers in GRID[bench.device.type]
        for make in (taking, scoring)
    )


class State:
    """A controller behind so many tokens, and the one that comes next."""

    def __init__(
        self, bench: Bench, batch: int, layers: int, tokens: int, dtype: torch.dtype
    ) -> None:
        config = ControllerConfig(1, 1, layers=layers)
        controller = Controller(config).to(bench.device).requires_grad_(False)
        self.cell, self.head = controller.packed()
        self.point = {"batch": batch, "layers": layers, "tokens": tokens}
        self.tokens = tokens
        self.came = torch.randn(batch, 3 * config.hidden, device=bench.device)
        self.state = torch.randn(batch, config.hidden, device=bench.device).tanh()
        shape = (batch, tokens + 1, config.remembered)
        self.memory = torch.randn(shape, device=bench.device, dtype=dtype)
        self.query = torch.randn(batch, layers * config.match, device=bench.device)
        self.newest = torch.full((batch,), tokens - 1, device=bench.device)

    def advance(self) -> Tensor:
        return advance(self.cell, self.came, self.state, self.memory, self.newest)

    def score(self) -> Tensor:
        return score(self.head, self.memory, self.query, self.newest, self.tokens)


def taking(bench: Bench, batch: int, layers: int, tokens: int, dtype: torch.dtype) -> Case:
    """The same token comes again and again."""
    given = State(bench, batch, layers, tokens, dtype)
    kept = given.memory[:, 0].numel() * given.memory.element_size()
    return Case(
        "ADORE's controller, a token taken in",
        given.point,
        given.advance,
        _bytes(*given.cell, given.came, given.state, given.state, given.query) + kept,
        partial(correct_state, given),
    )


def scoring(bench: Bench, batch: int, layers: int, tokens: int, dtype: torch.dtype) -> Case:
    """Scores of all tokens for the newest."""
    given = State(bench, batch, layers, tokens, dtype)
    read = given.memory[:, : given.tokens].numel() * given.memory.element_size()
    written = 4 * layers * batch * tokens
    return Case(
        "ADORE's controller, all tokens scored",
        given.point,
        given.score,
        _bytes(*given.head, given.query) + read + written,
        partial(correct_scores, given),
    )


def correct_state(given: State) -> str:
    """Queries, states and the new token's memory must be the twin's; no other token's changes."""
    before = given.state.clone(), given.memory.clone()
    with poisoned():
        query = given.advance()
    found = [query, given.state.clone(), given.memory[:, given.tokens - 1].clone()]
    after = given.memory.clone()
    after[:, given.tokens - 1] = before[1][:, given.tokens - 1]
    given.state.copy_(before[0])
    exact, wide = before[0].clone(), before[1].to(torch.float32, copy=True)
    with torch_only():
        asked = advance(given.cell, given.came, exact, wide, given.newest)
    wanted = [asked, exact, wide[:, given.tokens - 1]]
    return apart(found, wanted, names="queries,states,memory") or apart(
        after, before[1], close=0.0, names="memory of other tokens"
    )


def correct_scores(given: State) -> str:
    """All scores must be those of the same numbers in float32."""
    with poisoned():
        found = given.score()
    with torch_only():
        exact = score(given.head, given.memory.float(), given.query, given.newest, given.tokens)
    return apart(found, exact, names="scores")


def _bytes(*given: object) -> int:
    return sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))
