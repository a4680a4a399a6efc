"""What H2O keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import POSITION, SCORE, held
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Its budget, heavy hitters and newest rows alike."""
    return held(config, method, layer, tokens, prompt)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full, then cut."""
    return None


def slot_bytes(config: DecoderConfig, method: Method) -> int:
    """Each head's row has a position, and a score while rows still leave."""
    scored = bool(method["eviction"].params.generated == "evict")
    return POSITION + SCORE * scored
