"""The interface of a budget: how the rows that a cache may keep are divided among its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a prompt has shown; on the CPU but for `ranks`.

    Attributes:
        prompt: [B] int64, rows of each sample's prompt, padding excluded.
        most: [B] int64, rows of each sample that a layer can hold at all, no less than `least`.
        least: rows that every layer must keep.
        window: newest rows that its eviction protects (SnapKV's voters); 0 where it has none.
        readers: of each layer that owns keys and values, from the bottom, the decoder layers that
            read it; K of them.
        cosines: [B, layers] float64 of every decoder layer, if asked for (`Budget.importance`):
            between the residual stream before and after attention, the mean over the rows.
        spread: [B, layers] float64, if asked for: the entropy of the attention that a layer's keys
            got, divided by the most it can be; 1 is attention to all alike.
        ranks: if asked for, [B, K, S]: each row's mean rank over the heads; -inf on padding.
    """

    prompt: Tensor
    most: Tensor
    least: int
    window: int
    readers: tuple[tuple[int, ...], ...]
    cosines: Tensor | None = None
    spread: Tensor | None = None
    ranks: Tensor | None = None

    def bounded(self, rows: Tensor) -> Tensor:
        """Bring rows [B, K] within what layers must keep and can hold."""
        return rows.clamp(min=self.least).minimum(self.most[:, None])


class Budget(ABC):
    """What a value of the budget axis names as its implementation; made as `cls(params)`.

    Attributes:
        importance: what it wants to know of the layers before it divides: "cosine", "mass" or
            "ranks"; None: nothing but lengths, so that each layer of a prompt can be cut as soon as
            it was read.
        refresh: it divides anew after so many steps; None: never.
    """

    importance: str | None = None
    refresh: int | None = None

    def __init__(self, params: Any) -> None:
        self.params = params

    def averages(self, evidence: Evidence) -> Tensor:
        """[B] int64: what an `Amount` gives each sample, within what is possible."""
        lengths: list[int] = evidence.prompt.tolist()
        rows = [self.params.rows(length) for length in lengths]
        return evidence.bounded(torch.tensor(rows)[:, None])[:, 0]

    @abstractmethod
    def rows(self, evidence: Evidence) -> Tensor:
        """Return [B, K] int64 on the CPU: past rows that each layer keeps of each sample."""


class Fixed(Budget):
    """So many rows in every layer, whatever a method says; made with their number, None: all."""

    def rows(self, evidence: Evidence) -> Tensor:
        most = int(evidence.most.max())
        rows = most if self.params is None else min(self.params, most)
        return torch.full((len(evidence.prompt), len(evidence.readers)), rows)
