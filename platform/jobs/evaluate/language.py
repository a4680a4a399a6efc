"""How a fact, a question and filler are said: as symbols of a recall corpus, or in English."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvlab.platform.data import corpus
from kvlab.platform.data.recall import Symbols, symbols_of
from kvlab.platform.data.tokenizer import Coder
from kvlab.platform.jobs.evaluate.english import DIGITS, SENTENCES, THINGS


class Fact(NamedTuple):
    """What says it, what asks for it (token ids), and the answer (text, or token ids)."""

    said: Sequence[int]
    question: Sequence[int]
    answer: str | tuple[int, ...]


class Language(ABC):
    """Says facts and questions as token ids.

    Attributes:
        most: facts that one prompt may hold.
        opening: the ids that begin a text.
        answer_tokens: that are generated to see an answer.
    """

    most: int
    opening: tuple[int, ...] = ()
    answer_tokens: int

    @abstractmethod
    def filler(self, draw: random.Random) -> Sequence[int]:
        """Return a piece of filler: facts stand between pieces, never inside one."""

    @abstractmethod
    def facts(self, draw: random.Random, count: int) -> list[Fact]:
        """Draw so many facts about different keys, at most `most`."""

    @abstractmethod
    def right(self, generated: Sequence[int], answer: str | tuple[int, ...]) -> bool:
        """Say whether the generated ids are the answer."""


class SymbolLanguage(Language):
    """The recall corpus's own: a fact is a key and the words of its value, a question is the key.

    Args:
        ids: of every word. answer: words of a value, all different in one prompt.
    """

    def __init__(self, ids: dict[str, int], symbols: Symbols, answer: int) -> None:
        self._ids, self._symbols, self.answer_tokens = ids, symbols, answer
        self.most = min(symbols.keys, symbols.values // answer)

    def filler(self, draw: random.Random) -> Sequence[int]:
        return (self._ids[f"filler{draw.randrange(self._symbols.filler)}"],)

    def facts(self, draw: random.Random, count: int) -> list[Fact]:
        words = self.answer_tokens
        keys = draw.sample(range(self._symbols.keys), count)
        values = draw.sample(range(self._symbols.values), count * words)
        found = []
        for number, key in enumerate(keys):
            question = (self._ids[f"key{key}"],)
            own = values[number * words : (number + 1) * words]
            answer = tuple(self._ids[f"value{value}"] for value in own)
            found.append(Fact(question + answer, question, answer))
        return found

    def right(self, generated: Sequence[int], answer: str | tuple[int, ...]) -> bool:
        return tuple(generated) == answer


class EnglishLanguage(Language):
    """For checkpoints people have: digits among plain sentences, in their tokenizer's tokens.

    Attributes:
        keys: the things that have a code.
    """

    keys = len(THINGS)
    most = keys

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self.opening = tuple(coder.opening[0].tolist())
        # One for a space that stands alone, one for digits that are joined otherwise.
        self.answer_tokens = len(self._said(f" {10**DIGITS - 1}")) + 2
        self._sentences = [self._said(sentence) for sentence in SENTENCES]

    def filler(self, draw: random.Random) -> Sequence[int]:
        return draw.choice(self._sentences)

    def facts(self, draw: random.Random, count: int) -> list[Fact]:
        found = []
        for key in draw.sample(range(self.keys), count):
            code = draw.randrange(9 * 10 ** (DIGITS - 1))
            question = self._said(f" The code of the {THINGS[key]} is")
            found.append(Fact(self.fact(key, code), question, self._digits(code)))
        return found

    def fact(self, key: int, code: int) -> Sequence[int]:
        """Return what says that a thing has a code, counted from the lowest of its digits."""
        return self._said(f" The code of the {THINGS[key]} is {self._digits(code)}.")

    def right(self, generated: Sequence[int], answer: str | tuple[int, ...]) -> bool:
        assert isinstance(answer, str)
        text: str = self._coder.tokenizer.decode(list(generated))
        return text.lstrip().startswith(answer)

    def _said(self, text: str) -> list[int]:
        ids: list[int] = self._coder.encode([text])[0][0].tolist()
        return ids

    def _digits(self, code: int) -> str:
        return str(10 ** (DIGITS - 1) + code)


def language_of(data: Path, answer: int) -> Language:
    """Return the language of a data job's folder: symbols where it is a recall corpus's.

    Args:
        answer: words of an answer in symbols.

    Raises:
        DataError: the folder holds no data.
    """
    from tokenizers import Tokenizer

    file = data / "tokenizer.json"
    symbols = symbols_of(file)
    tokenizer = Tokenizer.from_file(str(file))
    if symbols is not None:
        return SymbolLanguage(tokenizer.get_vocab(), symbols, answer)
    return EnglishLanguage(Coder(tokenizer, corpus.describe(data)["end_of_text"]))
