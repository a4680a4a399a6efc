"""How a settings field reports mistakes that lie deeper than the field itself."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic_core import PydanticCustomError

NESTED = "kvlab_nested"
"""The pydantic error type whose context holds `problems`: (path below the field, message) pairs."""

MOST_COMPARED = 500
"""Known names that a wrong one is compared with: the work must not grow with a user's file."""

Path = tuple[str | int, ...]


def nested(problems: Sequence[tuple[Path, str]]) -> PydanticCustomError:
    """Return the error a validator raises for mistakes at paths below its own field."""
    return PydanticCustomError(NESTED, "see problems", {"problems": list(problems)})


def wrong(message: str) -> PydanticCustomError:
    """Return the error a validator raises for the field itself."""
    return PydanticCustomError("kvlab", "{message}", {"message": message})


def suggest(name: object, known: Sequence[str], *, most: int = 24) -> str:
    """Return "did you mean 'x'? known: ..." for a name that is not among `known`."""
    close = get_close_matches(str(name), known[:MOST_COMPARED], n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    listed = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
    return f"{hint}known: {listed or 'none'}"
