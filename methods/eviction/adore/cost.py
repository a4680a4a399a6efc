"""What ADORE keeps, reads and works out; the controller and what it knows of tokens included."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import held
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.adore.params import AdoreParams
from kvlab.methods.eviction.adore.sizes import ControllerConfig, config_of

ID, SCORE = 4, 4
"""Bytes of a token's id, int32, and of its score, float32."""


def rows(config: DecoderConfig, method: Method, layer: int, tokens: int, prompt: int) -> float:
    """Its budget m; rebuilt rows are held for a step."""
    return held(config, method, layer, tokens, prompt)


def prompt_window(config: DecoderConfig, method: Method, layer: int) -> int | None:
    """A prompt is read in full, then cut."""
    return None


def voters(config: DecoderConfig, method: Method, prompt: int) -> int:
    """Rows of a prompt whose attention is looked at."""
    return prompt if _params(method).scores == "rule" else 0


def beside(config: DecoderConfig, method: Method) -> float:
    """Rows that go through all layers beside that of a decode step, on average."""
    params = _params(method)
    return params.rebuild / params.every if params.source == "recompute" else 0.0


def logged_bytes(config: DecoderConfig, method: Method, tokens: int, itemsize: int) -> float:
    """Bytes of a sequence beside its slots: ids, scores, and what scores are made of.

    The controller's weights, which all sequences of a batch share, are left out.
    """
    params = _params(method)
    known = tokens + 1  # padding goes to a row of its own
    if params.source == "offload" and params.rebuild:
        width = 2 * config.kv_heads * config.head_dim
        offloaded = known * itemsize * width * len(config.kv_layers)
    else:
        offloaded = 0
    layers = len(config.kv_layers) if params.per == "layer" else 1
    if params.scores == "rule":
        return known * (ID + 2 * SCORE * layers) + offloaded
    sizes = _sizes(params, config)
    log = ID + SCORE * layers + sizes.remembered * itemsize
    return known * log + 4 * sizes.hidden + offloaded


def step_flops(config: DecoderConfig, method: Method, context: int) -> float:
    """FLOPs of the controller in a decode step: its state, and a score for every token."""
    params = _params(method)
    if params.scores == "rule":
        return 0.0
    sizes = _sizes(params, config)
    each = 2 * sizes.layers * (sizes.hidden + sizes.match)
    return 2.0 * sizes.parameters + each * context / params.refresh


def _params(method: Method) -> AdoreParams:
    params = method["eviction"].params
    assert isinstance(params, AdoreParams)
    return params


@lru_cache(maxsize=64)
def _sizes(params: AdoreParams, config: DecoderConfig) -> ControllerConfig:
    """Those of a controller; of one by default where it is not trained yet."""
    if params.controller:
        return config_of(Path(params.controller))
    layers = len(config.kv_layers) if params.per == "layer" else 1
    return ControllerConfig(config.vocab_size, config.width, layers=layers)
