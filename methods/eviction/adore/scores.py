"""Who tells how much each token so far matters to the current one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.adore import Cell, Head, advance, answers, score
from kvlab.methods.eviction.adore.controller import Controller, Memory


class Fresh(NamedTuple):
    """Tokens that came in one pass, each sample's own first.

    embedded [B, T, W]; positions [B, T], `Scores.rows` (past all others) on padding; counts [B].
    """

    embedded: Tensor
    positions: Tensor
    counts: Tensor


class Scores(ABC):
    """Scores every token that was ever seen, held or released. A token is known by its position.

    Attributes:
        rows: positions that there may be; one more takes what is padding.
        layers: KV layers, in order, that are scored each for itself; 1: all alike.
        wants_mass: `credit` is to be called.
        kept: scores [layers, B, rows + 1] float32 that it adds to, beside those that count now.
        memory: [B, rows + 1, n], what it keeps of every token; state: [B, h] float32, of all.
    """

    wants_mass = False

    def __init__(
        self,
        batch: int,
        rows: int,
        layers: int,
        device: torch.device,
        *,
        memory: int = 0,
        dtype: torch.dtype = torch.float32,
        state: int = 0,
    ) -> None:
        self.rows, self.layers, self.device = rows, layers, device
        self.kept: list[Tensor] = []
        self.memory = torch.zeros(batch, rows + 1, memory, device=device, dtype=dtype)
        self.state = torch.zeros(batch, state, device=device)

    @abstractmethod
    def see(self, fresh: Fresh) -> None:
        """Take in tokens; the last of each sample is now the current one."""

    def credit(self, layer: int, mass: Tensor, positions: Tensor) -> None:  # noqa: B027
        """Hear the attention [B, S] that tokens at positions [B, S] received in a layer.

        Args: layer: its number among `layers`.
        """

    @abstractmethod
    def every(self, count: int, newest: Tensor) -> Tensor:
        """Score the first `count` positions for the current token.

        Args: newest: [B, 1], its position.

        Returns: [layers, B, count] float32: more matters more; what was never seen means nothing.
        """

    @abstractmethod
    def of(self, layer: int, positions: Tensor, newest: Tensor) -> Tensor:
        """Score tokens at positions [B, S], up to `rows`, for the current one: [B, S] float32.

        Args: layer: its number among `layers`.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What a saved cache keeps of it: the live tensors."""
        kept = {f"kept.{i}": scores for i, scores in enumerate(self.kept)}
        return {**kept, "memory": self.memory, "state": self.state}

    def shared_bytes(self) -> int:
        """Bytes that do not grow with the batch: weights."""
        return 0


class ControllerScores(Scores):
    """A trained controller's; it keeps a few numbers of every token, and one state.

    Args: dtype: of what is kept.
    """

    def __init__(
        self,
        controller: Controller,
        batch: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        c = controller.config
        super().__init__(
            batch, rows, c.layers, device, memory=c.remembered, dtype=dtype, state=c.hidden
        )
        self._controller = controller
        self._packed = _packed(controller) if answers(self.memory) else None
        self._query = self.state[:, :0]

    def see(self, fresh: Fresh) -> None:
        if self._packed is not None and fresh.embedded.shape[1] == 1:
            came, place = self._controller.incoming(fresh.embedded[:, 0]), fresh.positions[:, 0]
            self._query = advance(self._packed[0], came, self.state, self.memory, place)
            return
        z = self._controller.states(fresh.embedded, self.state)
        came = torch.cat(self._controller.remember(z), dim=-1).to(self.memory.dtype)
        self.memory.scatter_(1, fresh.positions.unsqueeze(-1).expand_as(came), came)
        last = (fresh.counts - 1).clamp_min(0)[:, None, None].expand(-1, 1, z.shape[-1])
        any_came = (fresh.counts > 0).unsqueeze(-1)
        self.state.copy_(torch.where(any_came, z.gather(1, last)[:, 0], self.state))
        if self._packed is not None:
            self._query = self._controller.asks(self.state)

    def every(self, count: int, newest: Tensor) -> Tensor:
        if self._packed is not None:
            return score(self._packed[1], self.memory, self._query, newest[:, 0], count)
        places = torch.arange(count, device=self.device).unsqueeze(0)
        memory = self.memory[:, :count]
        return self._score(memory, places, newest, slice(None)).transpose(0, 1)

    def of(self, layer: int, positions: Tensor, newest: Tensor) -> Tensor:
        if self._packed is not None:
            head, match = self._packed[1], self._controller.config.match
            own = slice(layer, layer + 1)
            head = head._replace(weight=head.weight[own], bias=head.bias[own])
            query = self._query[:, layer * match : (layer + 1) * match]
            return score(head, self.memory, query, newest[:, 0], positions)[0]
        memory = at(self.memory, positions)
        return self._score(memory, positions, newest, slice(layer, layer + 1))[:, 0]

    def _score(self, memory: Tensor, positions: Tensor, newest: Tensor, layers: slice) -> Tensor:
        """[B, L, S]."""
        c = self._controller.config
        parts = Memory(*torch.split(memory.float(), [c.hidden, c.match], dim=-1))
        z = self.state.unsqueeze(1)
        return self._controller.logits(parts, z, positions, newest, layers)[:, :, 0]

    def shared_bytes(self) -> int:
        return self._controller.nbytes()


class MassScores(Scores):
    """H2O's score, of all heads and layers that are scored alike: attention received so far."""

    wants_mass = True

    def __init__(self, batch: int, rows: int, layers: int, device: torch.device) -> None:
        super().__init__(batch, rows, layers, device)
        self._mass = torch.zeros(layers, batch, rows + 1, device=device)
        self.kept = [self._mass]

    def see(self, fresh: Fresh) -> None:
        """It knows no token before it was read."""

    def credit(self, layer: int, mass: Tensor, positions: Tensor) -> None:
        self._mass[layer].scatter_add_(1, torch.where(positions < 0, self.rows, positions), mass)

    def every(self, count: int, newest: Tensor) -> Tensor:
        return self._mass[:, :, :count]

    def of(self, layer: int, positions: Tensor, newest: Tensor) -> Tensor:
        return self._mass[layer].gather(1, positions)


@lru_cache(maxsize=4)
@torch.no_grad()
def _packed(controller: Controller) -> tuple[Cell, Head]:
    return controller.packed()


def at(kept: Tensor, positions: Tensor) -> Tensor:
    """Gather [B, rows, D] at positions [B, S]."""
    return kept.gather(1, positions.unsqueeze(-1).expand(-1, -1, kept.shape[-1]))
