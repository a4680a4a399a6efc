"""What StreamingLLM keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import alike, held
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Its budget, the sinks inside."""
    return held(config, method, layer, tokens, prompt)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full, then cut."""
    return None


def in_one_pass(config: DecoderConfig, method: Method) -> bool:
    """A mask says it where nothing moves, nothing grows and all layers keep as many rows.

    Layers with windows of their own do not: sinks leave them, and make room, as they move out.
    """
    params = method["eviction"].params
    by_age = params.positions == "absolute" and params.generated == "evict" and not params.turns
    return by_age and alike(method) and not (params.sinks and config.windows)
