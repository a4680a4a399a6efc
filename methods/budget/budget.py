"""The interface of a budget: how the rows that a cache may keep are divided among its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a prompt has shown; on the CPU but for `ranks`.

    Attributes:
        prompt: [B] int64, rows of each sample's prompt, padding excluded.
        most: rows that a layer can hold at all.
        least: rows that every layer must keep.
        layers: of the decoder that own keys and values, from the bottom; K of them.
        cosines: [B, K] float64, lowest among the decoder layers that read a KV layer; None unless
            asked for (`Budget.importance`).
        spread: [B, K] float64, likewise: the entropy of the attention that a layer's rows got,
            divided by the most it can be, so 1 is attention to all alike.
        ranks: K tensors [B, S] of the mean rank over the heads, -inf on padding; None unless asked.
    """

    prompt: Tensor
    most: int
    least: int
    layers: tuple[int, ...]
    cosines: Tensor | None = None
    spread: Tensor | None = None
    ranks: tuple[Tensor, ...] | None = None


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

    @abstractmethod
    def rows(self, evidence: Evidence) -> Tensor:
        """Return [B, K] int64 on the CPU: past rows that each layer keeps of each sample."""
