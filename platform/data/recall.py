"""A synthetic corpus on which a tiny model learns to look things up in its past.

Associative recall as in Arora et al. (arXiv 2312.04927): facts, a key and the words of its value,
stand among filler, and whenever a key comes again its value is the answer. Every word is one token,
and facts are drawn anew for every document, so nothing but the past tells an answer. A value has
several words because the first is told by the whole prompt, before any cache was cut.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvlab.platform.data import vocabulary
from kvlab.platform.data.documents import Document, Segment
from kvlab.platform.data.vocabulary import END_OF_TEXT

KINDS = ("key", "value", "filler")
END = "."
"""The last word of a document: after it comes the end of text."""
LONGEST_RUN = 24
"""Words of filler in a row at most."""
_WORD = re.compile(rf"({'|'.join(KINDS)})(\d+)")


@dataclass(frozen=True, slots=True)
class Symbols:
    """How many words of each kind there are: `key0`, `key1`, ..., `value0`, ..., `filler0`, ..."""

    keys: int
    values: int
    filler: int

    def words(self) -> list[str]:
        """Every token of the vocabulary, in the order of the ids."""
        counts = zip(KINDS, (self.keys, self.values, self.filler), strict=True)
        return [END_OF_TEXT, END, *(f"{kind}{i}" for kind, count in counts for i in range(count))]

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def symbols_of(tokenizer: Path) -> Symbols | None:
    """Return the words of a recall corpus's tokenizer.json; None where it is any other."""
    tokens = vocabulary.tokens_of(tokenizer)
    counts = dict.fromkeys(KINDS, 0)
    for token in tokens:
        if match := _WORD.fullmatch(token):
            counts[match[1]] += 1
    found = Symbols(counts["key"], counts["value"], counts["filler"])
    return found if set(found.words()) == set(tokens) else None


def documents(source: Mapping[str, Any]) -> Iterator[Document]:
    """Yield seeded documents of `length` words each; see `Writing` for what stands in them.

    Args:
        source: documents, length (words), keys, values, filler (words of each kind), pairs (facts
            in a document at most), answer (words of a value), seed.
    """
    for number in range(source["documents"]):
        draw = random.Random(f"{source['seed']} {number}")
        yield Writing(source, draw).document()


class Writing:
    """A document in the making: clumps of new facts, filler, and runs of questions, in any order.

    A run asks for a fact and for those that were introduced after it. Only words of runs count that
    followed the word before them already: values, and keys by which a run goes on in known order.
    No word of a value stands in two facts of a document, so each word tells the next.
    """

    def __init__(self, source: Mapping[str, Any], draw: random.Random) -> None:
        self._source, self._draw = source, draw
        self._left = source["length"] - 1
        # As many documents of few facts, which are learnt first, as of many, which are wanted.
        pairs, words = round(source["pairs"] ** draw.random()), source["answer"]
        self._filler = draw.choice((0.0, 0.1, 0.3))
        keys = draw.sample(range(source["keys"]), pairs)
        values = draw.sample(range(source["values"]), pairs * words)
        self._facts = [
            (f"key{key}", *(f"value{word}" for word in values[i * words : (i + 1) * words]))
            for i, key in enumerate(keys)
        ]
        self._known: list[tuple[str, ...]] = []
        self._words: list[tuple[str, bool]] = []
        self._followed: set[tuple[str, str]] = set()

    def document(self) -> Document:
        while self._left > 0:
            kind = self._draw.random()
            if not self._known or (kind < 0.35 and len(self._known) < len(self._facts)):
                self._introduce(self._draw.randint(1, 4))
            elif kind > 1 - self._filler:
                self._fill(self._draw.randint(1, LONGEST_RUN))
            else:
                self._ask()
        self._left = 1
        self._write(END)
        return tuple(self._segments())

    def _introduce(self, count: int) -> None:
        for fact in self._facts[len(self._known) :][:count]:
            self._known.append(fact)
            for word in fact:
                self._write(word)

    def _fill(self, count: int) -> None:
        for _ in range(count):
            self._write(f"filler{self._draw.randrange(self._source['filler'])}")

    def _ask(self) -> None:
        first = self._draw.randrange(len(self._known))
        for place in range(first, len(self._known)):
            key, *value = self._known[place]
            self._write(key, asked=place > first)
            for word in value:
                self._write(word, asked=True)
            if self._draw.random() < 0.5:
                return

    def _write(self, word: str, *, asked: bool = False) -> None:
        if self._left > 0:
            self._left -= 1
            step = (self._words[-1][0] if self._words else "", word)
            self._words.append((word, asked and step in self._followed))
            self._followed.add(step)

    def _segments(self) -> Iterator[Segment]:
        """Words that count alike are one segment; a space ends every word."""
        held: list[str] = []
        counted = False
        for word, counts in self._words:
            if held and counts != counted:
                yield Segment("".join(held), counted)
                held = []
            counted = counts
            held.append(f"{word} ")
        yield Segment("".join(held), counted)
