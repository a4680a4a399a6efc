"""Llama, Mistral, Qwen2 and Qwen3: one layout, with small differences in the settings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.huggingface.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    Names,
    linear,
    token_ids,
    write_scaling,
)
from kvlab.methods.decoder.huggingface.settings import CheckpointError, Settings


def _common(settings: Settings) -> dict[str, Any]:
    """What the four have in common."""
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    theta, scaling, fraction = settings.rope("rope_theta", "partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise CheckpointError(
            f"{settings.where}: 'partial_rotary_factor' {fraction} is not supported: must be 1"
        )
    settings.expect("attention_dropout", 0)
    vocabulary = settings.size("vocab_size")
    return {
        "vocab_size": vocabulary,
        **token_ids(settings, vocabulary),
        "width": width,
        "layers": settings.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": settings.size("num_key_value_heads", heads),
        "ffn_width": settings.size("intermediate_size"),
        "norm_eps": settings.take("rms_norm_eps", float),
        "activation": settings.choose("hidden_act", ACTIVATIONS),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_positions": settings.size("max_position_embeddings"),
        "tie_embeddings": settings.take("tie_word_embeddings", bool, False),
        "init_std": settings.take("initializer_range", float, 0.02),
        "head_dim": settings.size("head_dim", width // heads),
    }


def read(settings: Settings) -> DecoderConfig:
    """Read Llama's settings; refuses what is left of them."""
    settings.assume(bos_token_id=1, eos_token_id=2)
    bias = settings.take("attention_bias", bool, False)
    mlp_bias = settings.take("mlp_bias", bool, False)
    common = _common(settings)
    settings.close()
    return DecoderConfig(**common, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _read_mistral(settings: Settings) -> DecoderConfig:
    settings.assume(num_key_value_heads=8, sliding_window=4096, bos_token_id=1, eos_token_id=2)
    settings.expect("attention_bias", False)
    window = settings.maybe("sliding_window", int)
    common = _common(settings)
    settings.close()
    return DecoderConfig(**common, windows=None if window is None else (window,) * common["layers"])


def _read_qwen2(settings: Settings) -> DecoderConfig:
    settings.assume(num_key_value_heads=32, sliding_window=4096)
    common = _common(settings)
    windows = _layer_windows(settings, common["layers"])
    settings.close()
    return DecoderConfig(**common, qkv_bias=True, windows=windows)


def _read_qwen3(settings: Settings) -> DecoderConfig:
    settings.assume(num_key_value_heads=32, head_dim=128, sliding_window=4096)
    bias = settings.take("attention_bias", bool, False)
    common = _common(settings)
    windows = _layer_windows(settings, common["layers"])
    settings.close()
    return DecoderConfig(**common, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=windows)


def _layer_windows(settings: Settings, layers: int) -> tuple[int | None, ...] | None:
    """Qwen's windows: by `layer_types`, or for the layers from `max_window_layers` on."""
    used = settings.take("use_sliding_window", bool, False)
    window = settings.maybe("sliding_window", int)
    first = settings.take("max_window_layers", int, 28)
    kinds = settings.maybe("layer_types", list)
    if not used:
        window = None
    if kinds is None:
        kinds = ["sliding_attention" if window and i >= first else "full_attention"
                 for i in range(layers)]  # fmt: skip
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"{settings.where}: 'layer_types' {kind!r} is not supported")
    if len(kinds) != layers or (window is None and "sliding_attention" in kinds):
        raise CheckpointError(
            f"{settings.where}: 'layer_types' does not fit num_hidden_layers or sliding_window"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else None


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "rope_theta": config.rope_theta,
        "rope_scaling": write_scaling(config.rope_scaling),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        "attention_dropout": 0.0,
    }


def write(config: DecoderConfig) -> dict[str, Any]:
    """Return Llama's settings."""
    return _write(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return _write(config) | {"sliding_window": config.windows[0] if config.windows else None}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.layers
    return _write(config) | {
        "use_sliding_window": any(windows),
        "sliding_window": next((w for w in windows if w), None),
        "max_window_layers": config.layers,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.qkv_bias}


def names(config: DecoderConfig) -> Iterator[Names]:
    """Every tensor; layers whose keys and values no layer reads have queries alone."""
    yield Names("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        owned = "qkv" if i in config.kv_layers else "q"
        projections = [f"{attention}.{part}_proj" for part in owned]
        yield Names(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield from linear(f"{ours}.attention.qkv", *projections, bias=config.qkv_bias)
        yield from linear(f"{ours}.attention.out", f"{attention}.o_proj", bias=config.out_bias)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            yield Names(f"{ours}.attention.{norm}.weight", (f"{attention}.{norm}.weight",))
        yield Names(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for part in ("gate", "up", "down"):
            mlp = f"{theirs}.mlp.{part}_proj"
            yield from linear(f"{ours}.mlp.{part}", mlp, bias=config.mlp_bias)
    yield Names("norm.weight", ("model.norm.weight",))
    if not config.tie_embeddings:
        yield Names("output.weight", ("lm_head.weight",))


_family = partial(Family, names=names)

FAMILIES = (
    _family("LlamaForCausalLM", "llama", read, write),
    _family("Qwen3ForCausalLM", "qwen3", _read_qwen3, _write_qwen3),
    _family("Qwen2ForCausalLM", "qwen2", _read_qwen2, _write_qwen2),
    _family("MistralForCausalLM", "mistral", _read_mistral, _write_mistral),
)
