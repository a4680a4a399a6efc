"""YAML text to plain values, each with its line. Refuses what a workflow has no use for.

Scalars follow YAML 1.2's core schema: `yes` is text, `3e-3` is a number. Tags, anchors, aliases,
merge keys and duplicate keys are refused, and so is anything large or deep, so that reading takes
time and memory in proportion to the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from kvlab.platform.spec.problems import Problem, WorkflowError, dotted, shown

LARGEST_FILE = 2**20
DEEPEST = 32
LARGEST_INTEGER = 2**63 - 1

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


@dataclass(slots=True)
class Place:
    """Where a value stands: its line (of its key, inside a mapping) and its children's places."""

    line: int
    children: dict[str | int, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Document:
    """A workflow's YAML as plain values, and the places of all of them."""

    file: str
    value: dict[str, Any]
    place: Place

    def line(self, path: Sequence[str | int]) -> int:
        """Return the line of a path, or of the nearest thing above it that is written."""
        place = self.place
        for part in path:
            below = place.children.get(part)
            if below is None:
                break
            place = below
        return place.line

    def problem(self, path: Sequence[str | int], message: str) -> Problem:
        return Problem(self.file, self.line(path), dotted(path), message)


def read_text(path: File) -> str:
    """Return the text of a workflow file.

    Raises:
        WorkflowError: it is not there, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise _refused(str(path), None, f"cannot be read: {reason}") from None
    except ValueError:
        raise _refused(str(path), None, "cannot be read: no such file") from None
    if len(content) > LARGEST_FILE:
        raise _refused(
            str(path), 1, f"is larger than {LARGEST_FILE} bytes, the most a workflow may be"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise _refused(str(path), line, f"must be UTF-8, found {found}") from None


def parse(text: str, file: str = "workflow") -> Document:
    """Read a workflow's YAML.

    Raises:
        WorkflowError: naming the line of the first thing that stops the reading, or every
            duplicate key and value that is refused.
    """
    if len(text) > LARGEST_FILE:
        raise _refused(file, 1, f"is larger than {LARGEST_FILE} characters")
    if (at := text.find("\0")) >= 0:
        raise _refused(file, text.count("\n", 0, at) + 1, "must not hold NUL characters")
    # YAML 1.1 also breaks lines where no editor does: make those characters count for none.
    builder = _Builder(file)
    text = text.translate(_NO_BREAKS)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except yaml.YAMLError as error:
        line = _line_of(error, text)
        tab = _tab(text, line)
        if tab is not None:
            raise _refused(file, tab, f"line {tab} is indented with a tab: use spaces") from None
        raise _refused(file, line, f"is not valid YAML: {_reason(error)}") from None
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise _refused(file, line, "must be UTF-8, found half of a surrogate pair") from None
    return builder.document()


_NO_BREAKS = dict.fromkeys(map(ord, "\x85\u2028\u2029"), " ")
_BREAK = re.compile(r"\r\n|\r|\n")
_TAB = re.compile(r" *\t\s*[^\s#]")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _refused(file: str, line: int | None, message: str) -> WorkflowError:
    return WorkflowError([Problem(file, line, "", message)])


def _line_of(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:  # the end of a text without a last newline counts as one line more
        return min(int(mark.line) + 1, len(_BREAK.findall(text)) + 1)
    return text.count("\n", 0, getattr(error, "position", 0)) + 1


def _tab(text: str, last: int) -> int | None:
    """The first line up to line `last` whose indentation holds a tab."""
    lines = _BREAK.split(text)[:last]
    found = (n for n, line in enumerate(lines, 1) if _TAB.match(line))
    return next(found, None)


def _reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(reason).split())


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not been read yet."""

    value: Any
    place: Place
    path: tuple[str | int, ...]
    key: str | None = None
    key_line: int = 0


class _Builder:
    """Builds values from YAML events with a stack of its own: no recursion on a user's text."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._stack: list[_Open] = []
        self._problems: list[Problem] = []
        self._root: tuple[Any, Place] | None = None
        self._documents = 0

    def take(self, event: Any) -> None:
        kind = type(event)
        line = event.start_mark.line + 1
        if kind is yaml.DocumentStartEvent:
            self._documents += 1
            if self._documents > 1:
                raise _refused(self._file, line, "must hold one YAML document, found a second")
        elif kind is yaml.AliasEvent:
            raise _refused(self._file, line, f"must not use aliases, found *{event.anchor}")
        elif kind is yaml.ScalarEvent:
            self._refuse_properties(event, line)
            self._scalar(event, line)
        elif kind in (yaml.MappingStartEvent, yaml.SequenceStartEvent):
            self._refuse_properties(event, line)
            self._start({} if kind is yaml.MappingStartEvent else [], line)
        elif kind in (yaml.MappingEndEvent, yaml.SequenceEndEvent):
            self._stack.pop()

    def document(self) -> Document:
        if self._root is None or self._root[0] is None:
            raise _refused(self._file, 1, "is empty")
        value, place = self._root
        if self._problems:
            raise WorkflowError(self._problems)
        if not isinstance(value, dict):
            raise _refused(self._file, place.line, f"must be a mapping, found {shown(value)}")
        return Document(self._file, value, place)

    def _refuse_properties(self, event: Any, line: int) -> None:
        if event.anchor is not None:
            raise _refused(self._file, line, f"must not use anchors, found &{event.anchor}")
        if event.tag is not None:
            raise _refused(self._file, line, f"must not use tags, found {event.tag}")

    def _scalar(self, event: Any, line: int) -> None:
        holder = self._stack[-1] if self._stack else None
        plain = event.implicit[0]
        if holder is not None and isinstance(holder.value, dict) and holder.key is None:
            self._key(holder, event.value, plain, line)
            return
        path = self._path(holder)
        self._put(holder, self._value(event.value, plain, path, line), Place(line))

    def _key(self, holder: _Open, key: str, plain: bool, line: int) -> None:
        if plain and key == "<<":
            raise _refused(self._file, line, "must not use merge keys (<<)")
        if plain and key in ("", "~"):
            self._problem(line, holder.path, "has an empty key")
        if "\0" in key:
            raise _refused(self._file, line, "must not hold NUL characters")
        if key in holder.value:
            first = holder.place.children[key].line
            self._problem(line, (*holder.path, key), f"is written twice, first on line {first}")
        holder.key, holder.key_line = key, line

    def _start(self, value: Any, line: int) -> None:
        holder = self._stack[-1] if self._stack else None
        if holder is not None and isinstance(holder.value, dict) and holder.key is None:
            raise _refused(self._file, line, "must have text as keys, found a list or mapping")
        if len(self._stack) >= DEEPEST:
            raise _refused(self._file, line, f"must not nest deeper than {DEEPEST} levels")
        path = self._path(holder)
        place = Place(line)
        self._put(holder, value, place)
        self._stack.append(_Open(value, place, path))

    def _path(self, holder: _Open | None) -> tuple[str | int, ...]:
        if holder is None:
            return ()
        return (*holder.path, len(holder.value) if holder.key is None else holder.key)

    def _put(self, holder: _Open | None, value: Any, place: Place) -> None:
        if holder is None:
            self._root = (value, place)
        elif isinstance(holder.value, dict):
            assert holder.key is not None
            place.line = holder.key_line
            holder.value[holder.key] = value
            holder.place.children[holder.key] = place
            holder.key = None
        else:
            holder.place.children[len(holder.value)] = place
            holder.value.append(value)

    def _value(self, text: str, plain: bool, path: tuple[str | int, ...], line: int) -> Any:
        if "\0" in text:
            raise _refused(self._file, line, "must not hold NUL characters")
        if not plain:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > 20 or abs(int(text)) > LARGEST_INTEGER:
                self._problem(line, path, f"is too large a number, found {shown(text)}")
                return 0
            return int(text)
        if _NOT_FINITE.fullmatch(text):
            self._problem(line, path, f"must be a finite number, found {text}")
            return 0
        if _FLOAT.fullmatch(text):
            number = float(text)
            if number in (float("inf"), float("-inf")):
                self._problem(line, path, f"is too large a number, found {shown(text)}")
                return 0
            return number
        return text

    def _problem(self, line: int, path: Sequence[str | int], message: str) -> None:
        self._problems.append(Problem(self._file, line, dotted(path), message))
