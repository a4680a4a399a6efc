"""Time on the device alone: CUDA graphs hide launches, the L2 cache is cold for every call.

A graph holds several calls, each behind a write that fills the L2 cache; another holds the writes
alone. The two take turns, and a call's time is the difference. What cannot be captured is timed
with CUDA events, and on a CPU with its own clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch

from kvlab.methods.decoder.graph import capture
from kvlab.platform.bench.line import seconds

GIB = 1 << 30
FLUSHED = 2
"""The L2 cache is overwritten so many times over."""
ROUNDS = 9
PATIENCE = 0.05
"""Seconds of one call from which on it is repeated less often."""
Way = Literal["graph", "events", "clock"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a call, one for each round.

    Attributes:
        way: how it was timed. why: what kept it from being captured, empty if nothing did.
    """

    samples: list[float]
    way: Way
    why: str = ""

    @property
    def seconds(self) -> float:
        """The median."""
        return float(median(self.samples))


class Clock:
    """Times calls on one device.

    Attributes:
        l2: bytes of the device's L2 cache; 0 on a CPU.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._fill: torch.Tensor | None = None
        self._fills: dict[int, torch.cuda.CUDAGraph] = {}
        self.l2 = 0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.l2 = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
            self._fill = torch.empty(FLUSHED * self.l2, dtype=torch.uint8, device=self.device)

    def time(self, action: Callable[[], object], *, flush: bool = True) -> Timing:
        """Time a call that may be made again and again.

        Args:
            flush: let every call find the L2 cache cold.

        Raises:
            RuntimeError: what the call raises.
        """
        if self.device.type != "cuda":
            action()
            return Timing([seconds(action) for _ in range(3)], "clock")
        with torch.inference_mode():
            action()  # compiles
            torch.cuda.synchronize()
            once = self._event(action)
            calls = 1 if once > PATIENCE else 2 if once > 0.005 else 5 if once > 5e-4 else 20
            rounds = 3 if once > PATIENCE else ROUNDS
            try:
                return self._replayed(action, calls, rounds, flush)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize()  # raises where the device itself has failed
                why = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
            taken = [self._event(action, flush=flush) for _ in range(rounds)]
            return Timing(taken, "events", why)

    def copy_rate(self, size: int = GIB) -> float:
        """Bytes a second of a copy of so many bytes, read and written ones counted."""
        size = size if self.device.type == "cuda" else min(size, 1 << 22)
        source = torch.ones(size // 2, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.time(lambda: target.copy_(source), flush=False).seconds

    def product_rate(self, rows: int = 8192) -> float:
        """FLOP a second of a square bfloat16 matrix product of random numbers."""
        rows = rows if self.device.type == "cuda" else min(rows, 64)
        a = torch.randn(rows, rows, device=self.device).bfloat16()
        b = torch.randn(rows, rows, device=self.device).bfloat16()
        return 2 * rows**3 / self.time(lambda: a @ b, flush=False).seconds

    def _replayed(
        self, action: Callable[[], object], calls: int, rounds: int, flush: bool
    ) -> Timing:
        graph = capture(partial(self._run, action, calls, flush))
        try:
            beside = self._flushes(calls) if flush else None
            taken = []
            for number in range(rounds + 1):
                whole = _replay(graph)
                own = whole if beside is None else max(whole - _replay(beside), whole / 100)
                if number:
                    taken.append(own / calls)
        finally:
            torch.cuda.synchronize()
            graph.reset()
        return Timing(taken, "graph")

    def _flushes(self, calls: int) -> torch.cuda.CUDAGraph:
        if calls not in self._fills:
            self._fills[calls] = capture(partial(self._run, _nothing, calls, True))
        return self._fills[calls]

    def _run(self, action: Callable[[], object], calls: int, flush: bool) -> None:
        for _ in range(calls):
            if flush:
                self._flush()
            action()

    def _flush(self) -> None:
        assert self._fill is not None
        self._fill.zero_()

    def _event(self, action: Callable[[], object], *, flush: bool = True) -> float:
        if flush:
            self._flush()
        return _between(action)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    return _between(graph.replay)


def _between(action: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _nothing() -> None:
    """What a graph of flushes alone does beside them."""
