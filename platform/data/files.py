"""Text files, JSONL files and folders of them as documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvlab.platform.data.chat import conversation
from kvlab.platform.data.documents import DataError, Document, plain

PIECE = 4_096
"""Characters after which a text file is cut at the next blank line, so that it can be held out."""
LONGEST = 65_536
"""Characters after which it is cut wherever it is."""


def pattern_of(source: Mapping[str, Any], layout: str) -> str:
    """Return a folder source's glob, by default every .txt, or every .jsonl of conversations."""
    return source.get("pattern") or ("**/*.jsonl" if layout == "chat" else "**/*.txt")


def matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files of `folder` that match the glob, sorted by their path inside it.

    Raises:
        DataError: there is no such folder, or no file in it matches.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder}: there is no such folder")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"data folder {folder}: pattern '{pattern}' leaves the folder")
    found = [p for p in folder.glob(pattern) if p.is_file()]
    if not found:
        raise DataError(
            f"data folder {folder}: no file matches '{pattern}'; "
            "give `pattern`, e.g. '**/*.md' for Markdown in all subfolders"
        )
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def of_folder(folder: Path, pattern: str, column: str | None, chat: bool) -> Iterator[Document]:
    """Yield the documents of every matching file, in the order of their paths."""
    for path in matching(folder, pattern):
        yield from of_file(path, column, chat)


def of_file(path: Path, column: str | None, chat: bool) -> Iterator[Document]:
    """Yield a file's documents: JSONL one per line, any other text cut at blank lines.

    Args:
        path: UTF-8 text.
        column: the key of a JSONL line that holds the text; None: "messages" for chat, else "text".
        chat: lines are conversations.

    Raises:
        DataError: no such file, not UTF-8, or a line that is not as asked.
    """
    if not path.is_file():
        raise DataError(f"data file {path}: there is no such file")
    if path.suffix == ".jsonl":
        yield from _lines(path, column or ("messages" if chat else "text"), chat)
    elif chat:
        raise DataError(f"data file {path}: chat data must be JSONL (a file named *.jsonl)")
    else:
        yield from _pieces(path)


def _read(path: Path, size: int = -1) -> Iterator[tuple[int, str]]:
    number = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while line := file.readline(size):
                yield number, line.removeprefix("\ufeff") if number == 1 else line
                number += line.endswith("\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"data file {path}: not UTF-8 near line {number} (byte 0x{byte:02x}); "
            "convert it, e.g. `iconv -f latin1 -t utf-8`"
        ) from None
    except OSError as error:
        raise DataError(f"data file {path}: cannot be read: {error.strerror}") from None


def _pieces(path: Path) -> Iterator[Document]:
    held: list[str] = []
    size = 0
    for _, line in _read(path, LONGEST):
        held.append(line)
        size += len(line)
        if size >= LONGEST or (size >= PIECE and not line.strip()):
            yield plain("".join(held))
            held, size = [], 0
    if "".join(held).strip():
        yield plain("".join(held))


def _lines(path: Path, column: str, chat: bool) -> Iterator[Document]:
    for number, line in _read(path):
        if not line.strip():
            continue
        where = f"data file {path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object, found {type(row).__name__}")
        yield from of_row(row, column, chat, where)


def of_row(row: dict[str, Any], column: str, chat: bool, where: str) -> Iterator[Document]:
    """Yield the document of one record, or nothing where its text is blank.

    Raises:
        DataError: the column is missing or does not hold what the format asks for.
    """
    if column not in row:
        has = ", ".join(f"'{name}'" for name in sorted(row)) or "nothing"
        raise DataError(f"{where}: no column '{column}'; it has {has}")
    if chat:
        yield conversation(row[column], where)
    elif not isinstance(row[column], str):
        found = type(row[column]).__name__
        raise DataError(f"{where}: column '{column}' must be text, found {found}")
    elif row[column].strip():
        yield plain(row[column])
