"""What a sliding window keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import alike, held
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """The newest `window` of them; without one, its budget."""
    window = _window(method)
    if window is None:
        return held(config, method, layer, tokens, prompt)
    return min(window, tokens)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read through the same window; under a budget in full, then cut."""
    return _window(method)


def in_one_pass(config: DecoderConfig, method: Method) -> bool:
    """A mask says it where all layers have the same window."""
    return _window(method) is not None or alike(method)


def _window(method: Method) -> int | None:
    window: int | None = method["eviction"].params.window
    return window
