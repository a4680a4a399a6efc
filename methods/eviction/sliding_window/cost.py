"""What a sliding window keeps and reads."""

from __future__ import annotations

from kvlab.methods.eviction.sliding_window.params import SlidingWindowParams


def rows(params: SlidingWindowParams, tokens: int) -> int:
    """The newest `window` of them."""
    return min(params.window, tokens)


def prompt_window(params: SlidingWindowParams) -> int | None:
    """A prompt is read through the same window."""
    return params.window
