"""One kernel at one size: correct or no number, then its time beside its twin and its rivals."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.platform.bench.clock import Clock, Timing
from kvlab.platform.bench.line import Line, not_slower

LEAST_SHARE = 0.85
"""Of the bandwidth of a copy: the target of kernels that are bound by memory."""
CLOSE = 0.01
"""Norm of the error over the norm of the answer that bfloat16 excuses."""
MOST = 0.3
"""Of the memory that is free, what a case's inputs may take: twins make copies."""
Tensors = Tensor | Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed, and what it is held to.

    Attributes:
        kernel: its name. point: where on the grid, such as {"batch": 32, "rows": 4096}.
        ours: the call, which launches the kernel on CUDA. It may be repeated.
        bytes: that it has to move at least; flops: where arithmetic binds it, None: memory does.
        check: run the kernel and say what is wrong with it, "" if nothing is.
        twin: the same call in plain torch; None: `ours` with the kernels ruled out.
        rivals: other ways to the same end, or to the same without part of it, by name.
        held: whether the bandwidth target holds here, if the traffic is more than the L2 cache.
    """

    kernel: str
    point: Mapping[str, int | str]
    ours: Callable[[], object]
    bytes: int
    check: Callable[[], str]
    flops: float | None = None
    twin: Callable[[], object] | None = None
    rivals: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    held: bool = False

    @property
    def name(self) -> str:
        parts = [f"{value:,} {key}" if isinstance(value, int) and key != "batch" else
                 f"{key} {value}" for key, value in self.point.items()]  # fmt: skip
        return f"{self.kernel}, {', '.join(parts)}"


class Bench:
    """Measures cases on one device, whose rates it finds first."""

    def __init__(self, device: str) -> None:
        self.clock = Clock(device)
        self.device = torch.device(device)
        self._copy: float | None = None
        self._product: float | None = None

    @property
    def copy_rate(self) -> float:
        """Bytes a second of a large copy, measured once."""
        if self._copy is None:
            self._copy = self.clock.copy_rate()
        return self._copy

    @property
    def product_rate(self) -> float:
        """FLOP a second of a large matrix product, measured once."""
        if self._product is None:
            self._product = self.clock.product_rate()
        return self._product

    def fits(self, size: int) -> bool:
        """Whether inputs of so many bytes leave the rest of a case enough memory."""
        if self.device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        return size <= MOST * torch.cuda.mem_get_info(self.device)[0]

    def run(self, makers: Iterator[tuple[int, Callable[[], Case]]]) -> Iterator[Line]:
        """Measure one case after another, each made when its turn comes.

        What does not fit in memory is left out and named on stderr. The device's own failure, which
        no later call survives, ends the bench with the void line of the case that met it.

        Args:
            makers: the bytes of a case's inputs, and what makes it.
        """
        for size, make in makers:
            if not self.fits(size):
                print(f"left out: {size >> 30} GiB of inputs do not fit", file=sys.stderr)
                continue
            try:
                case = make()
            except torch.OutOfMemoryError:
                print(f"left out: {size >> 30} GiB of inputs do not fit", file=sys.stderr)
                continue
            yield from self.measure(case)
            del case
            if not self._alive():
                print("the device has failed: what was left is not measured", file=sys.stderr)
                return

    def measure(self, case: Case) -> Iterator[Line]:
        """The lines of one case: beside its twin, and beside its fastest rival."""
        try:
            with torch.inference_mode():
                wrong = case.check()
            ours = None if wrong else self.clock.time(case.ours)
        except Exception as error:
            wrong, ours = f"raised {type(error).__name__}: {_first(error)}", None
        if ours is None:
            unit = "GB/s" if case.flops is None else "TFLOP/s"
            yield Line(case.name, unit, 0.0, least_ratio=1.0, void=wrong, detail=_where(case))
            return
        found = {"kvlab": ours}
        with torch_only():
            twin = self._tried(case.twin or case.ours)
            if twin is not None:
                found["twin"] = twin
            for name, action in case.rivals.items():
                timed = self._tried(action)
                if timed is not None:
                    found[name] = timed
        yield self._beside_twin(case, found)
        rivals = {name: timed for name, timed in found.items() if name in case.rivals}
        if rivals:
            name = min(rivals, key=lambda name: rivals[name].seconds)
            yield Line(
                case.name,
                "µs",
                ours.seconds * 1e6,
                rivals[name].seconds * 1e6,
                beside=name,
                better="less",
                detail=_where(case),
            )

    def _beside_twin(self, case: Case, found: dict[str, Timing]) -> Line:
        ours, twin = found["kvlab"], found.get("twin")
        work = case.bytes / 1e9 if case.flops is None else case.flops / 1e12
        ceiling = self.copy_rate / 1e9 if case.flops is None else self.product_rate / 1e12
        on_gpu = self.device.type == "cuda"
        bound = case.held and on_gpu and case.bytes > self.clock.l2
        least = None
        if twin is not None and on_gpu:
            pairs = list(zip(ours.samples, twin.samples, strict=False))
            least = min(1.0, not_slower([a for a, _ in pairs], [b for _, b in pairs]))
        return Line(
            case.name,
            "GB/s" if case.flops is None else "TFLOP/s",
            work / ours.seconds,
            None if twin is None else work / twin.seconds,
            beside="" if twin is None else "twin",
            least_ratio=least,
            limit=float(f"{LEAST_SHARE * ceiling:.4g}") if bound else None,
            detail={
                **_where(case),
                "bytes": case.bytes,
                "flops": case.flops,
                "ceiling": ceiling,
                "share_of_ceiling": work / ours.seconds / ceiling,
                "microseconds": {name: t.seconds * 1e6 for name, t in found.items()},
                "samples": {name: t.samples for name, t in found.items()},
                "timed_by": {name: t.way for name, t in found.items()},
                "not_captured": {name: t.why for name, t in found.items() if t.why},
            },
        )

    def _tried(self, action: Callable[[], object]) -> Timing | None:
        """Time what may refuse the shape, or not fit in memory; None where it does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.clock.time(action)
            except RuntimeError:
                return None

    def _alive(self) -> bool:
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def apart(found: Tensors, wanted: Tensors, *, close: float = CLOSE, names: str = "output") -> str:
    """Say how answers differ from the exact ones; "" where they agree. NaN never does.

    Integers must be equal; of floats, the error's norm must be within `close` of the answer's.

    Args:
        names: of the answers, separated by commas.
    """
    ours = [found] if isinstance(found, Tensor) else list(found)
    exact = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    labels = names.split(",")
    for label, mine, other in zip(labels, ours, exact, strict=True):
        if mine.shape != other.shape:
            return f"{label}: {list(mine.shape)} where the twin has {list(other.shape)}"
        if not other.is_floating_point():
            if not torch.equal(mine, other.to(mine.dtype)):
                return f"{label} differs from the twin's"
            continue
        difference = torch.linalg.vector_norm(mine.double() - other.double())
        error = float(difference / torch.linalg.vector_norm(other.double()).clamp_min(1e-30))
        if not error <= close:
            return f"{label} is {error:.2g} of its norm from the twin's (at most {close:g})"
    return ""


def some(batch: int) -> list[int]:
    """Samples that are compared: the first, one in the middle, the last."""
    return sorted({0, batch // 2, batch - 1})


def forced(backend: Any, action: Callable[[], object]) -> Callable[[], object]:
    """The same call with torch's attention held to one of its backends."""
    from torch.nn.attention import sdpa_kernel

    def held() -> object:
        with sdpa_kernel(backend):
            return action()

    return held


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> dict[str, Any]:
    """Torch's attention over these heads, in every way that it has; some may refuse the shape."""
    from torch.nn.attention import SDPBackend
    from torch.nn.functional import scaled_dot_product_attention as attention

    grouped = partial(attention, q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    found: dict[str, Any] = {"torch SDPA": grouped}
    if q.is_cuda:
        found["SDPA, flash"] = forced(SDPBackend.FLASH_ATTENTION, grouped)
        found["SDPA, cuDNN"] = forced(SDPBackend.CUDNN_ATTENTION, grouped)
        if q.shape[2] == 1 and not causal:
            folded = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
            own = partial(attention, folded, k, v)
            found["SDPA, flash, groups as rows"] = forced(SDPBackend.FLASH_ATTENTION, own)
    return found


def _where(case: Case) -> dict[str, Any]:
    return {"kernel": case.kernel, "point": dict(case.point)}


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
