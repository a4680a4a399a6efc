"""What a sliding window keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int) -> int:
    """The newest `window` of them."""
    return min(_window(method), tokens)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read through the same window."""
    return _window(method)


def _window(method: Method) -> int:
    window: int = method["eviction"].params.window
    return window
