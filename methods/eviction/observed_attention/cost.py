"""What observed attention keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import POSITION, held
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Its budget of the prompt, and all that came after it."""
    return held(config, method, layer, tokens, prompt)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full, then cut."""
    return None


def slot_bytes(config: DecoderConfig, method: Method) -> int:
    """Each head's row has a position."""
    return POSITION
