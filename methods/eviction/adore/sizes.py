"""The sizes of ADORE's controller, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvlab import KvlabError

CONFIG = "controller.json"
BUCKETS = 64
"""Distances have one each up to half of these; the rest take ever wider ranges."""


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Attributes:
    vocab_size, width: of the language model whose embeddings it reads.
    state: what it knows of a token: "gru", of all before it too; "token", of the token alone.
    hidden: of the state and of the MLP over it.
    position: what the MLP is told beside the state: how far back a token is ("relative"), where
        it stands in the text ("absolute"), nothing ("none").
    match: dimensions in which a token's state is compared with the current one's. 0: not at all,
        as in the paper's formula.
    layers: KV layers that it scores for, each for itself; 1: for all alike.
    """

    vocab_size: int
    width: int
    state: Literal["gru", "token"] = "gru"
    hidden: int = 64
    position: Literal["relative", "absolute", "none"] = "relative"
    match: int = 32
    layers: int = 1

    @property
    def remembered(self) -> int:
        """Numbers that are kept of every token; see `Memory`."""
        return self.hidden + self.match

    @property
    def parameters(self) -> int:
        """Its weights, all of them."""
        h, w, m, n = self.hidden, self.width, self.match, self.layers
        state = 3 * h * (w + h + 2) if self.state == "gru" else h * (w + 1)
        positions = 0 if self.position == "none" else BUCKETS * h
        return state + h * (h + 1) + positions + n * (h + 1) + (n + 1) * m * (h + 1)


def config_of(folder: Path) -> ControllerConfig:
    """Read the sizes of a saved controller.

    Raises:
        KvlabError: the folder holds none.
    """
    try:
        raw: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        return ControllerConfig(**raw)
    except (OSError, ValueError, TypeError) as error:
        raise KvlabError(f"{folder}: holds no ADORE controller ({error})") from None
