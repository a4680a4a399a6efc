"""How the rows of a request lie in the blocks that a server gives it. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Space:
    """The arena of a request: state, then the slots of its KV layers, then a log of its tokens.

    Attributes:
        width: numbers of a row: keys and values of all heads, then what is known of it.
        block_size: rows of a block.
        head: rows in front of a request's slots. state: numbers that they hold.
        entry: numbers that are kept of every token, released or not.
        slots: from the positions of a prompt, and of its request at the end, to the slots that
            its blocks have room for.
    """

    width: int
    block_size: int
    head: int
    state: int
    entry: int
    slots: Callable[[int, int], int]

    @property
    def entries(self) -> int:
        """Tokens whose entries stand in one stripe of the log."""
        return max(1, self.width // self.entry)

    @property
    def stripe(self) -> int:
        """Rows of the pool that a stripe takes."""
        return math.ceil(self.entry / self.width)

    def log_rows(self, tokens: int) -> int:
        """Rows that the entries of so many tokens take."""
        return math.ceil(tokens / self.entries) * self.stripe if self.entry else 0
