"""What is asked and when: drawn from a seed before anything is sent. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """A message of a conversation: token ids that it adds, and tokens to be answered."""

    added: tuple[int, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Attributes: start: seconds after the beginning; turns: one after another's answer."""

    start: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Attributes:
    requests: turns in all, at least. prompt, generate: least and most tokens of a turn.
    turns: of a conversation; each begins with all that was said before.
    shared_prefix: tokens that all conversations begin with.
    vocabulary: ids are drawn from 1 up to it.
    """

    requests: int
    prompt: tuple[int, int]
    generate: tuple[int, int]
    turns: int
    shared_prefix: int
    vocabulary: int

    @property
    def longest(self) -> int:
        """Tokens of a request at most."""
        return self.shared_prefix + self.turns * (self.prompt[1] + self.generate[1])

    def drawn(self, rate: float, seed: int) -> list[Conversation]:
        """Draw conversations so that requests come at `rate` a second on average, Poisson's way.

        What is asked is the same at every rate.
        """
        lengths, gaps = random.Random(f"{seed} lengths"), random.Random(f"{seed} gaps")
        shared = self._ids(lengths, self.shared_prefix)
        found, start = [], 0.0
        for _ in range(-(-self.requests // self.turns)):
            turns = []
            for number in range(self.turns):
                added = self._ids(lengths, lengths.randint(*self.prompt))
                added = shared + added if number == 0 else added
                turns.append(Turn(added, lengths.randint(*self.generate)))
            found.append(Conversation(start, tuple(turns)))
            start += gaps.expovariate(rate / self.turns)
        return found

    def _ids(self, draw: random.Random, count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, self.vocabulary) for _ in range(count))
