"""Mistakes in a workflow: where each is, what was found, what is allowed. All are told at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kvlab import KvlabError
from kvlab.platform.jobs.field import NESTED, Path, suggest

SHOWN = 60
"""Characters of a found value that a message shows."""
LONGEST = 1_000
"""Characters of a message."""
LONGEST_PATH = 300
"""Characters of its YAML path."""

_MESSAGES = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "greater_than": "must be more than {gt:.15g}",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than": "must be less than {lt:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_long": "must be at most {max_length} characters long",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "alternatives": "must be {kinds}",
}
_KINDS = {"string_type": "text", "tuple_type": "a list"}
"""What a value that may be of several types must be."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake.

    `line` counts from 1, and is None where there is no text to count in; `path` is the YAML path,
    empty for the file as a whole.
    """

    file: str
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        path = (
            self.path if len(self.path) <= LONGEST_PATH else self.path[: LONGEST_PATH - 3] + "..."
        )
        where = f"{path}: " if path else ""
        line = "" if self.line is None else f":{self.line}"
        text = one_line(f"{self.file}{line}: {where}{self.message}")
        return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


class WorkflowError(KvlabError):
    """A workflow that cannot be run as written; `problems` holds every mistake."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems), key=lambda one: (one.line or 0, one)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def one_line(text: str) -> str:
    """Return text with everything that a terminal would not print on the same line escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """Return a short form of a found value."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "nothing"}[value]
    elif isinstance(value, Mapping):
        text = "a mapping" if value else "an empty mapping"
    elif isinstance(value, list | tuple):
        text = "a list" if value else "an empty list"
    else:
        text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def dotted(path: Iterable[str | int]) -> str:
    """Return `jobs.base.train.betas[0]` for a path."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def from_pydantic(
    error: ValidationError, raw: Any, model: type[BaseModel] | None = None
) -> Iterator[tuple[Path, str]]:
    """Yield (path inside `raw`, message) of every mistake, in our words.

    Args:
        error: what validating `raw` raised.
        raw: the value as it was written: paths are cut to what is really there.
        model: the model it was validated against, so that unknown keys can be told the known ones.
    """
    items = error.errors(include_url=False, include_input=False)
    placed = list(_placed(items, raw))
    misspelt = {
        (*path[:-1], close)
        for item, path in placed
        if item["type"] == "extra_forbidden" and path
        if (close := _close(path[-1], known_keys(model, path[:-1])))
    }
    for item, path in placed:
        if item["type"] == "missing" and path in misspelt:
            continue  # it is there, under a name that another line corrects
        if item["type"] == "too_short" and _inside(item["loc"], items):
            continue  # its entries were dropped for mistakes of their own
        context = item.get("ctx", {})
        if item["type"] == NESTED:
            for below, message in context["problems"]:
                yield (*path, *below), _with_found(message, raw, (*path, *below))
            continue
        if item["type"] == "extra_forbidden":
            yield path, unknown_key(path[-1] if path else "", known_keys(model, path[:-1]))
            continue
        pattern = _MESSAGES.get(item["type"])
        message = pattern.format(**context) if pattern else _lower(item["msg"])
        if item["type"] == "literal_error":
            message += _nearest(lookup(raw, path), context["expected"])
        yield path, _with_found(message, raw, path)


def unknown_key(key: object, known: Sequence[str]) -> str:
    """Say what a wrong key should have been, or which keys there are where none is near."""
    close = _close(key, known)
    meant = f"did you mean '{close}'?" if close else suggest(key, known)
    return f"unknown key: {meant}"


def _close(key: object, known: Sequence[str]) -> str | None:
    return next(iter(get_close_matches(str(key), known, n=1)), None)


def _placed(items: Sequence[Any], raw: Any) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """Yield mistakes with their paths; those of all alternatives of one value as one mistake."""
    placed = [(i, _existing(i["loc"], raw, keep_last=i["type"] == "missing")) for i in items]
    for item, path in placed:
        if item["type"] in _KINDS and len(path) < len(item["loc"]):
            if any(len(other) > len(path) and other[: len(path)] == path for _, other in placed):
                continue  # one alternative got as far as an entry
            alike = [i for i, other in placed if other == path and i["type"] in _KINDS]
            if item is not alike[0]:
                continue
            kinds = " or ".join(_KINDS[i["type"]] for i in alike)
            item = {**item, "type": "alternatives", "ctx": {"kinds": kinds}}
        yield item, path


def _inside(location: tuple[str | int, ...], items: Sequence[Any]) -> bool:
    """Whether another mistake lies below this place."""
    size = len(location)
    return any(len(i["loc"]) > size and i["loc"][:size] == location for i in items)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _nearest(found: Any, expected: str) -> str:
    close = get_close_matches(str(found), re.findall(r"'([^']*)'", expected), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _existing(location: Sequence[str | int], raw: Any, *, keep_last: bool) -> Path:
    """Drop the parts of a pydantic location that name alternatives rather than keys."""
    path: list[str | int] = []
    node = raw
    for index, part in enumerate(location):
        inside = (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            path.append(part)
            node = node[part]
        elif keep_last and index == len(location) - 1:
            path.append(part)
    return tuple(path)


_ABSENT = object()


def lookup(raw: Any, path: Sequence[str | int]) -> Any:
    """Return the value at a path, or a marker that equals nothing."""
    node = raw
    for part in path:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return node


def _with_found(message: str, raw: Any, path: Path) -> str:
    found = lookup(raw, path)
    if found is _ABSENT or "found" in message or not message.startswith("must"):
        return message
    return f"{message}, found {shown(found)}"


def known_keys(model: type[BaseModel] | None, path: Path) -> list[str]:
    """Return the keys that may stand at `path` below a model."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return []
        columns = {f.alias or name: f for name, f in current.model_fields.items()}
        column = columns.get(str(part))
        current = _inner(column.annotation) if column is not None else None
    if current is None:
        return []
    return [f.alias or name for name, f in current.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for part in get_args(annotation) if (m := _inner(part)) is not None), None)
