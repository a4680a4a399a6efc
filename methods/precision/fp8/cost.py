"""Bytes of fp8 rows."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig


def row_bytes(config: DecoderConfig, method: Method, itemsize: int) -> int:
    """A byte for each number; the scales, if there are any, in the model's dtype."""
    scaled = method["precision"].params.scale == "row"
    return 2 * config.kv_heads * (config.head_dim + (itemsize if scaled else 0))
