"""What full attention keeps and reads."""

from __future__ import annotations

from kvlab.methods.eviction.full.params import FullParams


def rows(params: FullParams, tokens: int) -> int:
    """All of them."""
    return tokens


def prompt_window(params: FullParams) -> int | None:
    """A prompt is read in full."""
    return None
