"""What an explicit list keeps."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, prompt: int) -> float:
    """The layer's own number."""
    listed: tuple[int, ...] = method["budget"].params.rows(prompt)
    return max(listed[config.kv_layers.index(layer)], least_rows(method))
