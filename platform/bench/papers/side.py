"""One side of a comparison: a model, what is applied to it, and its throughput at a workload.

A generation of g tokens is timed in two parts: the prefill of the prompts, and a few steps in the
middle of the generation, since what a step takes grows in a straight line with the context. The
steps are captured in one CUDA graph and replayed, where the session can be captured. The batch is
the largest that fits, by the cost model's bytes and then by trying.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.choice import torch_only
from kvlab.methods.block_transformer.session import BlockSession
from kvlab.methods.build import build
from kvlab.methods.cache.slots import SlotCache
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.graph import capture
from kvlab.methods.decoder.language_model import TokenSession
from kvlab.methods.model import LanguageModel, Session
from kvlab.methods.registry import resolve
from kvlab.platform.bench.line import Line

STEPS = 8
"""Of a round; a multiple of every block length here."""
REPLAYS = 5
USED = 0.9
"""Of the free memory, what the first try plans with."""
SMALLER = 0.8
"""A batch that did not fit is tried again at this share."""
TRIES = 8
ROWS_AT_ONCE = 1 << 15
"""Rows of a turn with which a context is filled up."""
WARM_ROWS = 1 << 16
"""Rows of a prefill that only warms up."""
ON_CPU = 2
"""The batch where there is no device memory to fill."""


class Workload(NamedTuple):
    """Tokens of the prompts, and generated ones."""

    prompt: int
    generate: int

    def __str__(self) -> str:
        return f"{self.prompt} + {self.generate} tokens"


@dataclass(frozen=True, slots=True)
class Side:
    """What is measured.

    Attributes:
        name: how it is called. trained, applied: a method's train-time and run-time axes.
        kernels: whether our kernels may answer; without them attention is torch's.
    """

    name: str
    config: DecoderConfig
    trained: dict[str, Any] = field(default_factory=dict)
    applied: dict[str, Any] = field(default_factory=dict)
    kernels: bool = True

    def same_model(self, other: Side) -> bool:
        """Whether the other's weights serve this side, too."""
        return (self.config, self.trained) == (other.config, other.trained)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a side reached.

    Attributes:
        batch: sequences. generate: tokens of each. prefill: seconds of their prompts.
        kv_bytes: of the live cache in the middle.
        eager, replayed: seconds of a step in the middle; replayed None where not captured.
        not_captured: why.
    """

    batch: int
    generate: int
    prefill: float
    kv_bytes: int
    eager: float
    replayed: float | None
    not_captured: str

    def rate(self, *, graph: bool) -> float:
        """Generated tokens a second, prefill included."""
        step = self.replayed if graph and self.replayed is not None else self.eager
        return self.batch * self.generate / (self.prefill + self.generate * step)


class Pair:
    """A side that others are compared with; what it reached at a workload is measured once."""

    def __init__(self, theirs: Side, device: str, dtype: torch.dtype) -> None:
        self.theirs, self.device, self.dtype = theirs, torch.device(device), dtype
        self._known: dict[Workload, Throughput] = {}
        self._model: tuple[Side, LanguageModel] | None = None

    def line(self, ours: Side, work: Workload, paper: str) -> Line:
        """The line of one method at one workload.

        Where one of the two cannot be captured, both count without a graph.

        Args:
            paper: what the paper says of it.
        """
        name = f"{ours.name}, {work}"
        try:
            if work not in self._known:
                self._known[work] = self._reached(self.theirs, work)
            other = self._known[work]
            mine = self._reached(ours, work)
        except (RuntimeError, ValueError, KvlabError) as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            void = f"raised {type(error).__name__}: {first}"
            return Line(name, "tokens/s", 0.0, least_ratio=0.0, void=void, detail={"paper": paper})
        graph = mine.replayed is not None and other.replayed is not None
        return Line(
            name,
            "tokens/s",
            mine.rate(graph=graph),
            other.rate(graph=graph),
            beside=f"{self.theirs.name}, batch {other.batch}",
            detail={
                "paper": paper,
                "workload": work._asdict(),
                "graphs": graph,
                "ours": asdict(mine),
                "theirs": asdict(other),
                "applied": {**ours.trained, **ours.applied},
            },
        )

    def _reached(self, side: Side, work: Workload) -> Throughput:
        """Measure a side; its model is kept as long as the next side has the same."""
        if self._model is None or not side.same_model(self._model[0]):
            self._model = None
            _collect(self.device)
            self._model = side, made(side, self.device, self.dtype)
        return throughput(self._model[1], side, work, self.device)


def made(side: Side, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A fresh model, its random weights drawn on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no copy in float32 first
    try:
        with device:
            return build(side.config, resolve(side.trained)).eval()
    finally:
        torch.set_default_dtype(before)


def throughput(
    model: LanguageModel, side: Side, work: Workload, device: torch.device
) -> Throughput:
    """Measure at the largest batch that fits.

    Raises:
        RuntimeError: a single sequence does not fit, or a kernel fails.
    """
    batch = planned(model, side, work, device)
    for _ in range(TRIES):
        _collect(device)
        try:
            with nullcontext() if side.kernels else torch_only(), torch.inference_mode():
                return once(model, side, work, batch, device)
        except torch.OutOfMemoryError:
            batch = int(batch * SMALLER)
            if not batch:
                break
    raise RuntimeError(f"no batch of {side.name} fits")


def planned(model: LanguageModel, side: Side, work: Workload, device: torch.device) -> int:
    """The batch that the cost model says will fit: caches, and a prefill's activations."""
    if device.type != "cuda":
        return ON_CPU
    _collect(device)
    config, size = side.config, next(model.parameters()).element_size()
    cost = cost_of(config, resolve({**side.trained, **side.applied}))
    total = work.prompt + work.generate
    kept = cost.kv_bytes(total, size, work.prompt)
    whole = cost_of(config, resolve(side.trained)).kv_bytes(work.prompt, size, work.prompt)
    inside = work.prompt * (3 * config.ffn_width + 6 * config.width) * size
    logits = 3 * config.vocab_size * size
    each = kept + (whole if side.applied else 0) + inside + logits
    batch = int(USED * torch.cuda.mem_get_info(device)[0] / each)
    return batch if batch < 16 else batch // 8 * 8


def once(
    model: LanguageModel, side: Side, work: Workload, batch: int, device: torch.device
) -> Throughput:
    """Measure one batch.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    apply = resolve(side.applied)
    prompts = torch.randint(side.config.vocab_size, (batch, work.prompt), device=device)

    def start(samples: int = batch) -> Session:
        return model.start(prompts[:samples], new_tokens=work.generate, apply=apply)

    start(min(batch, max(1, WARM_ROWS // work.prompt)))  # compiles
    _settle(device)
    begun = perf_counter()
    session = start()
    _settle(device)
    prefilled = perf_counter() - begun
    if isinstance(session, TokenSession):
        advance(session, prompts, work.generate // 2)
    else:
        del session  # it takes one token at a time: a longer prompt brings it to the middle
        longer = repeated(prompts, work.prompt + work.generate // 2)
        session = model.start(longer, new_tokens=-(-work.generate // 2), apply=apply)
    go_on(session)
    eager = _timed(lambda: go_on(session), device) / STEPS
    held = session.kv_bytes()
    replayed, why = _replayed(session, device)
    return Throughput(batch, work.generate, prefilled, held, eager, replayed, why)


def advance(session: TokenSession, prompts: Tensor, rows: int) -> None:
    """Bring a session so many tokens on, without its logits.

    A cache that keeps all gets random rows, since time does not depend on what they say. One that
    chooses is given turns made of the prompts [B, T].
    """
    cache = session._cache
    if isinstance(cache, SlotCache):
        state = cache.state()
        seen = int(state["seen"][0])
        tables = [t for name, t in state.items() if name.startswith("positions.")]
        if all(table.shape[1] >= seen + rows for table in tables):
            for name, tensor in state.items():
                if tensor.is_floating_point():
                    tensor[:, :, seen : seen + rows].normal_()
                elif name.startswith("positions."):
                    places = torch.arange(seen, seen + rows, device=tensor.device)
                    tensor[:, seen : seen + rows] = places
            cache.restore({**state, "seen": torch.tensor([seen + rows, 0])})
            session._next = session._next + rows
            return
    each = max(1, ROWS_AT_ONCE // len(prompts))
    for begun in range(0, rows, each):
        session.extend(repeated(prompts, min(each, rows - begun)))


def repeated(prompts: Tensor, tokens: int) -> Tensor:
    """The prompts [B, T] again and again, so many tokens of them [B, n]."""
    return prompts.repeat(1, -(-tokens // prompts.shape[1]))[:, :tokens]


def go_on(session: Session) -> None:
    """Generate a round of tokens, greedily."""
    for _ in range(STEPS):
        session.step(session.logits.argmax(-1))


def _replayed(session: Session, device: torch.device) -> tuple[float | None, str]:
    """Seconds of a step of a captured round; None, and what kept it from being captured.

    Replays begin at the same positions and write the same slots: their work is the same.
    """
    if device.type != "cuda":
        return None, "no CUDA device"
    try:
        graph = capture(lambda: go_on(session))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, (str(error).strip().splitlines() or ["no reason"])[0][:200]
    try:
        assert isinstance(session, TokenSession | BlockSession)
        begun = session._next.clone()

        def again() -> None:
            session._next.copy_(begun)
            graph.replay()

        again()
        taken = [_timed(again, device) for _ in range(REPLAYS)]
    finally:
        torch.cuda.synchronize()
        graph.reset()
    return float(median(taken)) / STEPS, ""


def _timed(action: Callable[[], object], device: torch.device) -> float:
    _settle(device)
    start = perf_counter()
    action()
    _settle(device)
    return perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
