"""Bytes of KIVI's rows: codes, scales and minima, and the rows that stay as they are."""

from __future__ import annotations

import math

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.precision.kivi.params import KiviParams

COUNTS = 16
"""Bytes for how many rows a sample has had: one number on the device, one on the host."""
SLOT = 4
"""Bytes of a recent row's slot."""


def row_bytes(config: DecoderConfig, method: Method, itemsize: int) -> float:
    """Bytes of a quantised row of one KV layer, keys and values."""
    params = _params(method)
    heads = config.kv_heads
    return heads * (_key(params, config, itemsize) + _value(params, config, itemsize))


def extra_bytes(config: DecoderConfig, method: Method, rows: float, itemsize: int) -> float:
    """Bytes of one KV layer with room for so many rows, beside theirs.

    The newest rows in the model's dtype (one more of values than of keys: the reference quantises
    after a step), their slots, the rest of the last key group, and a value row that is nobody's.
    """
    params, held = _params(method), math.ceil(rows)
    recent = (2 * params.recent(held) + 1) * (config.head_dim * itemsize + SLOT)
    rest = (params.slots(held) - rows) * _key(params, config, itemsize)
    return config.kv_heads * (recent + rest + _value(params, config, itemsize)) + COUNTS


def _key(params: KiviParams, config: DecoderConfig, itemsize: int) -> float:
    """Bytes of a key row of one head."""
    return config.head_dim * (params.bits / 8 + 2 * itemsize / params.group)


def _value(params: KiviParams, config: DecoderConfig, itemsize: int) -> int:
    """Bytes of a value row of one head; each of its groups is whole bytes."""
    width = params.value_group(config.head_dim)
    return config.head_dim // width * (math.ceil(width * params.bits / 8) + 2 * itemsize)


def _params(method: Method) -> KiviParams:
    params = method["precision"].params
    assert isinstance(params, KiviParams)
    return params
