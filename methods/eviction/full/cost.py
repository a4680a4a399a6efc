"""What full attention keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> int:
    """All of them."""
    return tokens


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full."""
    return None


def in_one_pass(config: DecoderConfig, method: Method) -> bool:
    """Nothing is evicted that a parallel pass would have to leave out."""
    return True
