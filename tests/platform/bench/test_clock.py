"""What the benches' clock makes of graphs and events, on a device that only passes for a GPU."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from kvlab.kernels import choice
from kvlab.platform.bench import clock as clock_module
from kvlab.platform.bench.clock import Clock
from kvlab.platform.bench.kernels.case import Bench, Case


class Replayed:
    """A graph on a device that is not there: it calls again what was captured."""

    made: ClassVar[list[Replayed]] = []

    def __init__(self, action: Any) -> None:
        self.action, self.live = action, True
        self.made.append(self)

    def replay(self) -> None:
        assert self.live
        self.action()

    def reset(self) -> None:
        self.live = False


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock whose device passes for CUDA's: a replay takes a second for each call in it."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    clock = Clock("cpu")
    clock.device = torch.device("cuda")
    clock._fill = torch.zeros(4, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock_module, "capture", Replayed)
    monkeypatch.setattr(clock, "_flush", lambda: now.__setitem__(0, now[0] + 30e-3))
    clock.spend = lambda ms: now.__setitem__(0, now[0] + ms)  # type: ignore[attr-defined]
    monkeypatch.setattr(Replayed, "made", [])
    return clock


@pytest.mark.parametrize("milliseconds", [4e-3, 2.0, 20.0, 200.0])
def test_a_call_takes_what_its_graph_takes_beyond_the_flushes(
    pretended: Any, milliseconds: float
) -> None:
    timing = pretended.time(lambda: pretended.spend(milliseconds))
    assert timing.way == "graph"
    assert timing.seconds == pytest.approx(milliseconds / 1e3)
    own, flushes = Replayed.made
    assert not own.live
    assert flushes.live  # for the next call with as many
    pretended.time(lambda: pretended.spend(milliseconds))
    assert len(Replayed.made) == 3


def test_what_cannot_be_captured_is_timed_with_events(
    pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(action: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(clock_module, "capture", refuse)
    timing = pretended.time(lambda: pretended.spend(2.0))
    assert timing.way == "events"
    assert timing.seconds == pytest.approx(2e-3)
    assert timing.why == "operation not permitted when stream is capturing"


def test_a_clock_without_a_gpu_says_so() -> None:
    clock = Clock("cpu")
    timing = clock.time(lambda: sum(range(1000)))
    assert timing.way == "clock"
    assert timing.seconds > 0
    assert clock.copy_rate() > 0
    assert clock.product_rate() > 0


@pytest.mark.parametrize(
    ("ours", "twin", "size", "met"),
    [
        (1.0, 2.0, 2_600_000_000, True),
        (1.0, 2.0, 2_500_000_000, False),  # less than 85 % of the copy
        (1.0, 0.5, 2_600_000_000, False),  # slower than the twin
        (1.0, 2.0, 50_000, True),  # in the L2 cache: the bandwidth is no target
    ],
)
def test_targets_of_a_gpu(
    pretended: Any, ours: float, twin: float, size: int, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench("cpu")
    bench.clock, bench.device, bench._copy = pretended, torch.device("cuda"), 3e12
    pretended.l2 = 50 << 20
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))

    def action() -> None:
        pretended.spend(twin if choice._twins_alone else ours)

    case = Case("kernel", {"batch": 32}, action, size, lambda: "", held=True)
    (line,) = bench.run(iter([(0, lambda: case), (1 << 29, lambda: case)]))
    assert line.met is met
    assert line.ratio == pytest.approx(twin / ours)
    assert (line.limit == pytest.approx(2550)) is (size > 50 << 20)
    assert line.detail is not None
    assert line.detail["share_of_ceiling"] == pytest.approx(size / 1e-3 / 3e12)
