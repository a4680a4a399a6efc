"""GPT-NeoX (Pythia): LayerNorm, GELU, biases, partial rotary, parallel residual."""

from __future__ import annotations

from collections.abc import Iterator
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
from kvlab.methods.decoder.huggingface.settings import Settings


def _read(settings: Settings) -> DecoderConfig:
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    theta, scaling, fraction = settings.rope("rotary_emb_base", "rotary_pct", 0.25)
    bias = settings.take("attention_bias", bool, True)
    settings.expect("num_key_value_heads", heads)
    for dropout in ("attention_dropout", "hidden_dropout"):
        settings.expect(dropout, 0)
        settings.expect(f"{dropout}_prob", 0)
    settings.assume(bos_token_id=0, eos_token_id=2)
    vocabulary = settings.size("vocab_size")
    ids: dict[str, Any] = token_ids(settings, vocabulary)
    config = DecoderConfig(
        vocab_size=vocabulary,
        **ids,
        width=width,
        layers=settings.size("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn_width=settings.size("intermediate_size"),
        norm="layer",
        norm_eps=settings.take("layer_norm_eps", float),
        activation=settings.choose("hidden_act", ACTIVATIONS),  # type: ignore[arg-type]
        gated=False,
        parallel=settings.take("use_parallel_residual", bool, True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        rotary_fraction=fraction,
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=settings.size("max_position_embeddings"),
        tie_embeddings=settings.take("tie_word_embeddings", bool, False),
        init_std=settings.take("initializer_range", float, 0.02),
    )
    settings.close()
    return config


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_width,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_scaling": write_scaling(config.rope_scaling),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "pad_token_id": config.pad_id,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _names(config: DecoderConfig) -> Iterator[Names]:
    yield Names("embedding.weight", ("gpt_neox.embed_in.weight",))
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        attention, mlp = f"{theirs}.attention", f"{theirs}.mlp"
        bias = config.qkv_bias
        yield from linear(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=True)
        yield from linear(
            f"{ours}.attention.qkv", f"{attention}.query_key_value", bias=bias, per_head=True
        )
        yield from linear(f"{ours}.attention.out", f"{attention}.dense", bias=config.out_bias)
        yield from linear(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=True)
        yield from linear(f"{ours}.mlp.up", f"{mlp}.dense_h_to_4h", bias=True)
        yield from linear(f"{ours}.mlp.down", f"{mlp}.dense_4h_to_h", bias=True)
    yield from linear("norm", "gpt_neox.final_layer_norm", bias=True)
    if not config.tie_embeddings:
        yield Names("output.weight", ("embed_out.weight",))


FAMILIES = (
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _read,
        _write,
        _names,
        ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    ),
)
