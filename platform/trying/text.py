"""The text that prompts are cut from: the person's own, Python's documentation, or token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.platform.data import files
from kvlab.platform.trying.subject import Subject

COLUMNS = ("text", "prompt")
"""What a JSONL line may call its text."""
SPARE = 8
"""Python's documentation is read until it has so many times the tokens that are wanted."""
ENOUGH = 1 << 22
"""Tokens of a person's text after which the rest is not counted."""
MOST_PAIRS = 8
"""Facts of a prompt that is asked about, where it has room."""
WORDS = 4096
"""Prompts of token ids are written in lines of so many."""


def column_of(file: Path) -> str | None:
    """The key that holds the text of a JSONL file; None: it is plain text.

    Raises:
        KvlabError: no such file, an empty one, or lines without a text.
    """
    if not file.is_file():
        raise KvlabError(f"--prompts: there is no file '{file}'")
    if file.suffix != ".jsonl":
        return None
    try:
        with file.open("rb") as lines:
            first = next((line for line in lines if line.strip()), None)
        row = None if first is None else json.loads(first)
    except OSError as error:
        raise KvlabError(f"--prompts: {file} cannot be read ({error.strerror})") from None
    except ValueError:
        row = {}
    if row is None:
        raise KvlabError(f"--prompts: {file} is empty")
    found = [name for name in COLUMNS if isinstance(row, dict) and name in row]
    if not found:
        raise KvlabError(
            f"--prompts: {file}: every line must be a JSON object with "
            f"{' or '.join(map(repr, COLUMNS))}"
        )
    return found[0]


def count(file: Path, column: str | None, subject: Subject) -> int:
    """Tokens that a person's text has, an end after each document; at least, past `ENOUGH`.

    Raises:
        KvlabError: it cannot be read as asked, or holds no text.
    """
    from tokenizers import Tokenizer

    coder = Tokenizer.from_file(str(subject.folder / "tokenizer.json"))
    total = 0
    for document in files.of_file(file, column, chat=False):
        for segment in document:
            total += len(coder.encode(segment.text, add_special_tokens=False).ids) + 1
        if total > ENOUGH:
            break
    if not total:
        raise KvlabError(f"--prompts: {file} is empty")
    return total


def pairs(subject: Subject, prompt: int) -> int:
    """Facts that a prompt of so many tokens holds beside filler and a question; 0: fewer than two.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    from kvlab.platform.data.tokenizer import make
    from kvlab.platform.jobs.evaluate.language import EnglishLanguage

    language = EnglishLanguage(make({"path": str(subject.folder)}, ()))
    longest = max(len(language.fact(key, 0)) for key in range(language.keys))
    room = prompt // (2 * longest) - 1
    return min(MOST_PAIRS, room) if room >= 2 else 0


def python_source(tokens: int) -> dict[str, Any]:
    """The `data:` of a workflow over Python's own documentation."""
    return {"source": "python", "holdout": 0.5, "max_tokens": SPARE * tokens}


def own_source(file: Path, column: str | None) -> dict[str, Any]:
    """The `data:` of a workflow over a person's file."""
    source: dict[str, Any] = {"text": str(file.absolute())}
    if column not in (None, "text"):
        source["column"] = column
    return {"source": source, "holdout": 1}


def token_source(folder: Path, subject: Subject, tokens: int, seed: int) -> dict[str, Any]:
    """Write token ids as words, and a tokenizer that reads them; return the `data:` over both.

    Args:
        folder: is there; the two files in it are replaced.
    """
    draw = random.Random(seed)
    size = subject.config.vocab_size
    ids = (str(draw.randrange(size)) for _ in range(tokens))
    lines = "".join(json.dumps({"text": " ".join(line)}) + "\n" for line in _batches(ids))
    _write(folder / "tokens.jsonl", lines)
    _write(folder / "tokenizer.json", json.dumps(_words(size)))
    _write(folder / "tokenizer_config.json", json.dumps({"eos_token": "0"}))
    source = {"text": str(folder / "tokens.jsonl")}
    return {"source": source, "tokenizer": {"path": str(folder)}, "holdout": 1}


def _batches(words: Iterator[str]) -> Iterator[list[str]]:
    while line := list(islice(words, WORDS)):
        yield line


def _words(size: int) -> Mapping[str, Any]:
    """A tokenizer.json whose tokens are the numbers below `size`, parted by spaces."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {str(number): number for number in range(size)},
            "unk_token": "0",
        },
    }


def _write(file: Path, text: str) -> None:
    """Replace a file whole, and only where it changes: digests remember when files changed."""
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
