"""A document as every source yields it, and the error for data that cannot be used."""

from __future__ import annotations

from typing import NamedTuple

from kvlab import KvlabError


class DataError(KvlabError):
    """Text that cannot be used as asked: names the file or data set, and the place in it."""


class Segment(NamedTuple):
    """A stretch of text; `counts` is false where it is context only (a chat's prompt)."""

    text: str
    counts: bool = True


Document = tuple[Segment, ...]
"""One text in reading order. Segments are tokenised apart, so no token spans two of them."""


def plain(text: str) -> Document:
    """Return a document all of whose tokens count."""
    return (Segment(text),)
