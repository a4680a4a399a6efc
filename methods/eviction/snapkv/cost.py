"""What SnapKV keeps and reads."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import POSITION, held
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Its budget of the prompt, the window inside, and all that came after it."""
    return held(config, method, layer, tokens, prompt)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full, then cut."""
    return None


def heads(config: DecoderConfig, method: Method) -> int:
    """Each KV head keeps rows of its own, or each query head."""
    by_query = method["eviction"].params.heads == "query"
    return config.heads if by_query else config.kv_heads


def voters(config: DecoderConfig, method: Method, prompt: int) -> int:
    """The window's queries, whose attention is worked out beside the fused one."""
    window: int = method["eviction"].params.window
    return window if window < prompt else 0


def slot_bytes(config: DecoderConfig, method: Method) -> int:
    """Each head's row has a position."""
    return POSITION
