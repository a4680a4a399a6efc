"""What ADORE keeps, reads and works out; the controller and what it knows of tokens included."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kvlab.methods.axis import Method
from kvlab.methods.budget.cost import held
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.adore.params import AdoreParams
from kvlab.methods.eviction.adore.sizes import ControllerConfig, config_of

WORD = 4
"""Bytes of a token's id, int32, and of a score, float32."""


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
    return most_beside(config, method) / _params(method).every


def most_beside(config: DecoderConfig, method: Method) -> int:
    """The most that there are in one step."""
    params = _params(method)
    return params.rebuild if params.source == "recompute" else 0


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
    words, numbers = entry(config, method)
    each = WORD * words + itemsize * numbers
    return known * each + state_bytes(config, method, itemsize) + offloaded


def entry(config: DecoderConfig, method: Method) -> tuple[int, int]:
    """What is kept of every token: words of 32 bits, and numbers of the model's own type."""
    params = _params(method)
    layers = len(config.kv_layers) if params.per == "layer" else 1
    if params.scores == "rule":
        return 1 + 2 * layers, 0
    return 1 + layers, _sizes(params, config).remembered


def state_bytes(config: DecoderConfig, method: Method, itemsize: int) -> int:
    """Bytes that a sequence has beside its tokens: the controller's state."""
    params = _params(method)
    return 0 if params.scores == "rule" else WORD * _sizes(params, config).hidden


def unserved(method: Method) -> str | None:
    """Say what a server cannot do."""
    params = _params(method)
    if params.readmit:
        return "readmit: what was released cannot come back on a server: leave it out"
    if params.source == "offload" and params.rebuild:
        return "source: offload: a server keeps nothing on the host: leave it out"
    return None


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
