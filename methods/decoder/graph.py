"""Greedy generation whose period, one step or a block's, is captured once and then replayed.

A captured graph runs the same kernels on the same memory again; it knows nothing of Python. So a
session is frozen first (`Session.freeze`), and hears of every replay (`Session.advance`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.model import Session

log = logging.getLogger("kvlab.graph")

LEAST = 8
"""Periods that must be left: one warms up, a capture takes as long as some others. Not measured."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Do on the device what was captured."""


Capture = Callable[[Callable[[], object]], Graph]
"""Captures what a call would launch, and launches nothing; a RuntimeError: it cannot be captured.

The call has been made before.
"""


def capture(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a call in a CUDA graph, on the current device: see `Capture`."""
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), _beside(torch.cuda.current_device())
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        action()
    return graph


def capture_on(device: torch.device) -> Capture | None:
    """Return what captures on a device; None where nothing does."""
    if device.type != "cuda":
        return None

    def there(action: Callable[[], object]) -> Graph:
        with torch.cuda.device(device):
            return capture(action)

    return there


@cache
def _beside(device: int) -> torch.cuda.Stream:
    """The stream that captures run on: one of each device, as each keeps memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Greedy:
    """The likeliest tokens of a session, one after another.

    Steps are eager until the session can be frozen. One period more is eager, which compiles
    kernels; the next is captured, the picks of its tokens included, and from then on replayed. What
    is no whole period at the end is eager again. Where others go on with the session in between
    (`step`, `extend`), it begins anew with their logits.

    Args:
        session: whose logits are those of the first token.
        capture: None: every step is eager.

    Attributes:
        replayed: steps that were replays.
        seconds: that capturing took, beside the steps.
    """

    def __init__(self, session: Session, capture: Capture | None) -> None:
        self._session, self._capture = session, capture
        self._logits: Tensor | None = None
        self._tokens = torch.empty(0)
        self._graph: Graph | None = None
        self._captured = torch.empty(0), torch.empty(0)
        self._single = 0  # steps to take one by one
        self.replayed, self.seconds = 0, 0.0

    @torch.inference_mode()
    def more(self, most: int) -> Tensor:
        """Return the next tokens [n, B], n from 1 to `most`.

        Args: most: tokens that are wanted in all, this call's included: whether a capture pays.

        Raises:
            KvlabError: as `Session.step`.
        """
        session = self._session
        if session.logits is not self._logits:
            self._graph, self._logits = None, session.logits
            self._tokens = session.logits.argmax(-1)
            return self._tokens.unsqueeze(0).clone()
        if self._graph is None and self._pays(most) and session.freeze():
            picked = self._period()
            self._record()
            return picked
        if self._graph is not None and most >= session.period:
            try:
                session.advance()
            except KvlabError:  # thawed, or full: one of the next steps says which
                self._single = session.period
            else:
                return self._replay(self._graph)
        self._graph = None  # a period would now begin elsewhere
        self._single = max(0, self._single - 1)
        return self._step().unsqueeze(0)

    def _pays(self, most: int) -> bool:
        enough = most >= LEAST * self._session.period
        return self._capture is not None and enough and not self._single

    def _step(self) -> Tensor:
        self._logits = self._session.step(self._tokens)
        return self._tokens.copy_(self._logits.argmax(-1)).clone()

    def _period(self) -> Tensor:
        return torch.stack([self._step() for _ in range(self._session.period)])

    def _record(self) -> None:
        """Capture a period: nothing runs, so whatever Python counted meanwhile is put back."""
        assert self._capture is not None
        session, device = self._session, self._tokens.device
        before = [(part, dict(vars(part))) for part in (self, *session.parts())]
        settle(device)
        begun, graph, why = perf_counter(), None, None
        picked = self._tokens

        def period() -> None:
            nonlocal picked
            picked = self._period()

        try:
            graph = self._capture(period)
        except KvlabError:  # the session was not opened for so many tokens: its steps will say it
            pass
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or ["no reason"])[0]
        finally:
            captured = picked, session.logits
            for part, attributes in before:
                vars(part).clear()
                vars(part).update(attributes)
        settle(device)  # raises where the device itself has failed
        self.seconds += perf_counter() - begun
        if graph is None:
            self._capture = None
            session.thaw()
        if why is not None:
            _say(why)
        self._graph, self._captured = graph, captured

    def _replay(self, graph: Graph) -> Tensor:
        graph.replay()
        picked, self._logits = self._captured
        self._session.logits = self._logits
        self.replayed += self._session.period
        return picked.clone()


@cache
def _say(why: str) -> None:
    """Say once why nothing was captured."""
    log.warning("decode steps stay eager, they cannot be captured: %s", why)


def settle(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
