"""A model of the transformers library as our caches see it: its sizes, and where its parts are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.methods.decoder.config import DecoderConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
"""Whose attention is scaled dot products over rotated keys, called through `AttentionInterface`."""


class HostError(KvlabError):
    """A transformers model that our caches cannot serve, or one that uses them otherwise."""


class Host(NamedTuple):
    """The parts of a model.

    Attributes:
        body: the module that runs the decoder layers. layers, attentions: those, and the attention
            of each.
        config: transformers' own; `sizes`: what a cache needs to know of it.
    """

    body: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    config: Any
    sizes: DecoderConfig

    @property
    def embedding(self) -> Tensor:
        """The table of embeddings: of the device and dtype that keys and values have."""
        table: Tensor = self.body.get_input_embeddings().weight  # type: ignore[operator]
        return table

    def turns(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions [B, T] or [B, H, T], for `rotate`."""
        rotary: Any = self.body.rotary_emb
        cos, sin = rotary.forward(like, position_ids=positions.clamp(min=0).flatten(1))
        shape = positions.shape if positions.dim() == 3 else positions.unsqueeze(1).shape
        return cos.view(*shape, -1), sin.view(*shape, -1)


def host(model: nn.Module) -> Host:
    """Find the parts of a model, one with adapters included.

    Raises:
        HostError: an architecture that is not one of `MODEL_TYPES`, or a model in parts.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODEL_TYPES:
        raise HostError(
            f"kv_cache: models of type '{kind}' are not supported; {', '.join(MODEL_TYPES)} are"
        )
    body = next(m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList))
    devices = {str(parameter.device) for parameter in body.parameters()}
    if len(devices) > 1:
        raise HostError(
            f"kv_cache: the model is spread over {', '.join(sorted(devices))}: load it on one "
            "device (device_map={'': 0})"
        )
    layers = list(body.layers)  # type: ignore[arg-type]
    attentions = [getattr(x, "attention" if kind == "gpt_neox" else "self_attn") for x in layers]
    sizes = _sizes(config)
    if any(abs(x.scaling * sizes.head_dim**0.5 - 1) > 1e-6 for x in attentions):
        raise HostError("kv_cache: the model scales attention by more than 1 / sqrt(head_dim)")
    return Host(body, layers, attentions, config, sizes)


def _sizes(config: Any) -> DecoderConfig:
    """What a cache needs to know of a decoder; what it does not is left at the default."""
    heads, width = config.num_attention_heads, config.hidden_size
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=width,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        ffn_width=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        windows=windows if any(windows) else None,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D] by cosines and sines [B, H or 1, T, R] of its first R dimensions."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    swapped = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), -1)
    turned = turned * cos + swapped * sin
    return turned if size == x.shape[-1] else torch.cat((turned, rest), -1)


def unturned(turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn nothing, in the shape of others."""
    return torch.ones_like(turns[0]), torch.zeros_like(turns[1])
