"""How a fact, a question and filler are said: as symbols of a recall corpus, or in English."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from kvlab.platform.data import corpus
from kvlab.platform.data.recall import symbols_of
from kvlab.platform.data.tokenizer import Coder
from kvlab.platform.jobs.evaluate.english import DIGITS, SENTENCES, THINGS


class Language(ABC):
    """Says facts and questions about numbered keys and values, as token ids.

    Attributes:
        keys, values: how many of each there are.
        opening: the ids that begin a text.
        answer_tokens: that are generated to see an answer.
    """

    keys: int
    values: int
    opening: tuple[int, ...] = ()
    answer_tokens: int

    @abstractmethod
    def filler(self, draw: random.Random) -> Sequence[int]:
        """Return a piece of filler: facts stand between pieces, never inside one."""

    @abstractmethod
    def fact(self, key: int, value: int) -> Sequence[int]:
        """Return what says that `key` has `value`."""

    @abstractmethod
    def question(self, key: int) -> Sequence[int]:
        """Return what asks for the value of `key`; the answer follows at once."""

    @abstractmethod
    def right(self, generated: Sequence[int], value: int) -> bool:
        """Say whether the generated ids answer with `value`."""


class SymbolLanguage(Language):
    """The corpus's own: a fact is the key and its value, a question is the key."""

    answer_tokens = 1

    def __init__(self, ids: dict[str, int], keys: int, values: int, filler: int) -> None:
        self.keys, self.values, self._filler, self._ids = keys, values, filler, ids

    def filler(self, draw: random.Random) -> Sequence[int]:
        return (self._ids[f"filler{draw.randrange(self._filler)}"],)

    def fact(self, key: int, value: int) -> Sequence[int]:
        return self._ids[f"key{key}"], self._ids[f"value{value}"]

    def question(self, key: int) -> Sequence[int]:
        return (self._ids[f"key{key}"],)

    def right(self, generated: Sequence[int], value: int) -> bool:
        return generated[0] == self._ids[f"value{value}"]


class EnglishLanguage(Language):
    """For checkpoints people have: digits among plain sentences, in their tokenizer's tokens."""

    keys = len(THINGS)
    values = 9 * 10 ** (DIGITS - 1)

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self.opening = tuple(coder.opening[0].tolist())
        # One for a space that stands alone, one for digits that are joined otherwise.
        self.answer_tokens = len(self._said(f" {10**DIGITS - 1}")) + 2
        self._sentences = [self._said(sentence) for sentence in SENTENCES]

    def filler(self, draw: random.Random) -> Sequence[int]:
        return draw.choice(self._sentences)

    def fact(self, key: int, value: int) -> Sequence[int]:
        return self._said(f" The code of the {THINGS[key]} is {self._digits(value)}.")

    def question(self, key: int) -> Sequence[int]:
        return self._said(f" The code of the {THINGS[key]} is")

    def right(self, generated: Sequence[int], value: int) -> bool:
        text: str = self._coder.tokenizer.decode(list(generated))
        return text.lstrip().startswith(self._digits(value))

    def _said(self, text: str) -> list[int]:
        ids: list[int] = self._coder.encode([text])[0][0].tolist()
        return ids

    def _digits(self, value: int) -> str:
        return str(10 ** (DIGITS - 1) + value)


def language_of(data: Path) -> Language:
    """Return the language of a data job's folder: symbols where it is a recall corpus's.

    Raises:
        DataError: the folder holds no data.
    """
    from tokenizers import Tokenizer

    file = data / "tokenizer.json"
    symbols = symbols_of(file)
    tokenizer = Tokenizer.from_file(str(file))
    if symbols is not None:
        return SymbolLanguage(tokenizer.get_vocab(), **symbols.to_dict())
    return EnglishLanguage(Coder(tokenizer, corpus.describe(data)["end_of_text"]))
