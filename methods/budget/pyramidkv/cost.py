"""What PyramidKV's schedule keeps."""

from __future__ import annotations

from functools import lru_cache

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.budget.pyramidkv import schedule
from kvlab.methods.decoder.config import DecoderConfig

_schedule = lru_cache(maxsize=1024)(schedule.rows)


def rows(config: DecoderConfig, method: Method, layer: int, prompt: int) -> float:
    """The layer's place in the schedule."""
    layers = config.kv_layers
    window: int = getattr(method["eviction"].params, "window", None) or 0
    every = _schedule(method["budget"].params, len(layers), prompt, window, least_rows(method))
    return every[layers.index(layer)]
