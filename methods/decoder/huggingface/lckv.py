"""Llama with keys and values shared across layers, as the code published with LCKV writes it.

Source: arXiv 2405.10637, 2410.14442. The config is Llama's with a sharing map (`layer_types`, a
text; other families give that key to a list of attention kinds), and layers that no layer reads
have neither `k_proj` nor `v_proj`.
"""

from __future__ import annotations

from typing import Any

from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.config import DecoderConfig, Sharing
from kvlab.methods.decoder.huggingface import llama
from kvlab.methods.decoder.huggingface.family import Family
from kvlab.methods.decoder.huggingface.settings import CheckpointError, Settings
from kvlab.methods.sharing.layer_types import LayerTypes, read_layer_types, write_layer_types

CODE = ("LCKVLlamaConfig", "LCKVLlamaModel", "LCKVLlamaForCausalLM")
"""Classes that `auto_map` may name: what they compute is known, and their files are never run."""


def _read(settings: Settings) -> DecoderConfig:
    settings.assume(sliding_window=4096)
    _refuse_other_code(settings)
    written = settings.maybe("layer_types", str)
    window = settings.maybe("sliding_window", int)
    passes = {
        "forward_passes": settings.take("forward_passes", int, 7),
        "backward_passes": settings.take("backward_passes", int, 2),
    }
    sequential = settings.take("use_sequential", bool, False)
    strict = settings.take("force_nodiag", bool, False)
    plain = llama.read(settings)
    if written is None and not strict:
        return plain
    if written is None:
        written = write_layer_types(range(plain.layers))
    kv_of, windowed = _map(written, plain.layers, settings.where)
    if any(windowed) and window is None:
        raise CheckpointError(f"{settings.where}: 'sliding_window' is missing: {written} needs one")
    shared = plain.with_(
        sharing=Sharing(kv_of, strict, **passes, sequential=sequential),
        windows=tuple(window if flag else None for flag in windowed) if any(windowed) else None,
    )
    return without_own(shared)


def _refuse_other_code(settings: Settings) -> None:
    for name in settings.take("auto_map", dict, {}).values():
        if not isinstance(name, str) or name.rpartition(".")[2] not in CODE:
            raise CheckpointError(
                f"{settings.where}: 'auto_map' {name!r} is not supported ({', '.join(CODE)} are)"
            )


def _map(written: str, layers: int, where: str) -> LayerTypes:
    try:
        found = read_layer_types(written)
    except MethodError as error:
        said = str(error).removeprefix("layers: ")
        raise CheckpointError(f"{where}: 'layer_types' {written!r}: {said}") from error
    if len(found.kv_of) != layers:
        raise CheckpointError(
            f"{where}: 'layer_types' {written!r} has {len(found.kv_of)} entries, "
            f"'num_hidden_layers' is {layers}"
        )
    if max(found.kv_of) >= layers:
        raise CheckpointError(
            f"{where}: 'layer_types' {written!r} names layer {max(found.kv_of)}; the last is "
            f"{layers - 1}"
        )
    return found


def _write(config: DecoderConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.layers
    sharing = config.sharing or Sharing(config.kv_of)
    window = next((window for window in windows if window), None)
    return llama.write(config) | {
        "layer_types": write_layer_types(config.kv_of, [w is not None for w in windows]),
        **({} if window is None else {"sliding_window": window}),
        "forward_passes": sharing.forward_passes,
        "backward_passes": sharing.backward_passes,
        "use_sequential": sharing.sequential,
        "force_nodiag": sharing.strict,
    }


def _discarded(config: DecoderConfig) -> frozenset[str]:
    """Where a plain checkpoint's config was given a map, maps to keys and values nobody reads."""
    return frozenset(
        f"model.layers.{i}.self_attn.{part}_proj.{kind}"
        for i in set(range(config.layers)) - set(config.kv_layers)
        for part in "kv"
        for kind in ("weight", "bias")
    )


def without_own(config: DecoderConfig) -> DecoderConfig:
    """Return the config without a sharing in which each layer reads its own keys, as any does."""
    own = config.kv_of == tuple(range(config.layers))
    strict = config.sharing is not None and config.sharing.strict
    return config.with_(sharing=None) if own and not strict else config


FAMILY = Family(
    "LCKVLlamaForCausalLM", "lckv-llama", _read, _write, llama.names, discarded=_discarded
)
