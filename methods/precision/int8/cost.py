"""Bytes of int8 rows."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig


def row_bytes(config: DecoderConfig, method: Method, itemsize: int) -> int:
    """A byte for each number, and the scales of keys and values in the model's dtype."""
    return 2 * config.kv_heads * (config.head_dim + itemsize)
