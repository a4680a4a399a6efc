"""The model a workflow starts from: a preset, explicit sizes, or a checkpoint people have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import Field, create_model

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import PRESETS, DecoderConfig
from kvlab.methods.registry import from_dict
from kvlab.platform.jobs.field import suggest
from kvlab.platform.jobs.kind import Parent, Settings

SIZES = ("width", "layers", "heads")
"""What explicit sizes must give; the rest has defaults."""

MODEL_SOURCES = (
    "kvlab.kernels",
    "kvlab.methods.axis",
    "kvlab.methods.budget.amount",
    "kvlab.methods.budget.budget",
    "kvlab.methods.build",
    "kvlab.methods.cache.ephemeral",
    "kvlab.methods.cache.interface",
    "kvlab.methods.cache.opening",
    "kvlab.methods.cache.storage",
    "kvlab.methods.cost",
    "kvlab.methods.decoder.config",
    "kvlab.methods.decoder.cost",
    "kvlab.methods.decoder.language_model",
    "kvlab.methods.decoder.layers",
    "kvlab.methods.decoder.model",
    "kvlab.methods.decoder.rope",
    "kvlab.methods.decoder.segments",
    "kvlab.methods.decoder.token",
    "kvlab.methods.model",
    "kvlab.methods.packing",
    "kvlab.methods.prefill",
    "kvlab.methods.registry",
    "kvlab.methods.store",
    "kvlab.methods.weights",
    "kvlab.platform.jobs.environment",
)
"""Packages and modules that decide what any model does, whatever its method.

Modules of the decoder and the cache one by one: what writes checkpoints for others, evicts or
serves makes no model stale.
"""

CHECKPOINT_SOURCES = (
    "kvlab.methods.sharing.layer_types",
    "kvlab.platform.jobs.checkpoint",
    *(
        f"kvlab.methods.decoder.huggingface.{name}"
        for name in (
            "description", "families", "family", "gpt_neox", "lckv", "llama", "reader", "settings",
        )
    ),
)  # fmt: skip
"""Modules that read a checkpoint people have."""


class ModelError(KvlabError):
    """A model that cannot be built as written."""


def _relaxed(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return Annotated[hint, Field(strict=False)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_relaxed(part) for part in get_args(hint))]  # noqa: UP007
    return hint


_HINTS = get_type_hints(DecoderConfig)
_COLUMNS: dict[str, Any] = {
    f.name: (_relaxed(_HINTS[f.name]) | None, None)
    for f in fields(DecoderConfig)
    if f.name != "sharing"  # a method's doing
}

ModelSettings: type[Settings] = create_model(
    "ModelSettings",
    __base__=Settings,
    __doc__="`{preset: NAME}`, `{width, layers, heads, ...}` or `{checkpoint: FOLDER}`.",
    preset=(str | None, None),
    checkpoint=(str | None, None),
    **_COLUMNS,
)


def resolve_model(settings: Settings, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec's `model`: {"config": ...} or {"checkpoint": ..., "fingerprint": ...}.

    Args:
        settings: a ModelSettings.
        data: `Surroundings.data`: vocab_size (None where a workflow has no data), folder that
            relative paths start from, contents that digests files.

    Raises:
        ModelError: an unknown preset, missing sizes, sizes that do not fit together.
    """
    written = settings.model_dump(exclude_unset=True, by_alias=True)
    written = {name: value for name, value in written.items() if value is not None}
    checkpoint = written.pop("checkpoint", None)
    preset = written.pop("preset", None)
    if checkpoint is not None:
        if written or preset:
            extra = ", ".join([*(["preset"] if preset else []), *written])
            raise ModelError(f"a checkpoint brings its own sizes: remove {extra}")
        return _from_checkpoint((Path(data["folder"]) / checkpoint).absolute(), data)
    if preset is not None:
        if preset not in PRESETS:
            raise ModelError(f"preset: unknown preset '{preset}': {suggest(preset, list(PRESETS))}")
        sizes = {**PRESETS[preset], **written}
        if "head_dim" not in written and {"width", "heads"} & set(written):
            sizes["head_dim"] = sizes["width"] // sizes["heads"]
    else:
        if missing := [name for name in SIZES if name not in written]:
            raise ModelError(
                f"needs {', '.join(missing)} (or a preset: {', '.join(PRESETS)}; or a checkpoint)"
            )
        sizes = _defaults(written)
    needed = data["vocab_size"] or 1
    if sizes.setdefault("vocab_size", needed) < needed:
        raise ModelError(f"vocab_size: the tokenizer has {needed}, found {sizes['vocab_size']}")
    return {"config": _config(sizes).to_dict()}


def _defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    sizes = dict(written)
    if "head_dim" not in sizes:
        if sizes["heads"] < 1 or sizes["width"] % sizes["heads"]:
            raise ModelError(
                f"heads: must divide width ({sizes['width']}) where head_dim is not given, "
                f"found {sizes['heads']}"
            )
        sizes["head_dim"] = sizes["width"] // sizes["heads"]
    sizes.setdefault("kv_heads", sizes["heads"])
    sizes.setdefault("ffn_width", 4 * sizes["width"])
    return sizes


def _config(sizes: Mapping[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(dict(sizes))
    except KvlabError as error:
        raise ModelError(str(error)) from None


def _from_checkpoint(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    from kvlab.platform.jobs.checkpoint import check_weights, read_config

    config = read_config(path)
    check_weights(path)
    needed = data["vocab_size"]
    if needed is not None and needed > config.vocab_size:
        raise ModelError(
            f"checkpoint: '{path}' has a vocabulary of {config.vocab_size}, the tokenizer needs "
            f"{needed}: give data.tokenizer the checkpoint's own, {{path: FOLDER}}"
        )
    return {"checkpoint": str(path), "fingerprint": data["contents"].checkpoint(path)}


def config_of(model: Mapping[str, Any]) -> DecoderConfig:
    """Return the sizes behind the `model` part of a spec."""
    known = _KNOWN.get(id(model))
    if known is None or known[0] is not model:
        if len(_KNOWN) > MOST_REMEMBERED:
            _KNOWN.clear()
        known = _KNOWN[id(model)] = (model, _sizes(model))
    return known[1]


MOST_REMEMBERED = 4096
_KNOWN: dict[int, tuple[Mapping[str, Any], DecoderConfig]] = {}
"""Sizes by the mapping they were read from: all cells of a workflow share few of those."""


def _sizes(model: Mapping[str, Any]) -> DecoderConfig:
    if "config" in model:
        return DecoderConfig.from_dict(dict(model["config"]))
    from kvlab.platform.jobs.checkpoint import read_config

    return read_config(Path(model["checkpoint"]))


def lineage(parent: Parent) -> tuple[DecoderConfig, dict[str, Any]]:
    """Return the sizes and the canonical train-time method of the model that `parent` publishes."""
    return config_of(_origin(parent).spec["model"]), dict(parent.spec.get("method", {}))


def beyond_positions(length: int, config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where texts of `sequence_length` tokens are too long for a model."""
    if length > config.max_positions:
        yield (
            "sequence_length",
            f"must be at most the model's max_positions ({config.max_positions}), found {length}",
        )


def model_key(parent: Parent) -> str:
    """Return a text that is equal for parents whose models have equal sizes and methods."""
    made = {"model": _origin(parent).spec["model"], "method": parent.spec.get("method", {})}
    return json.dumps(made, sort_keys=True)


def _origin(parent: Parent) -> Parent:
    while "model" not in parent.spec:
        if "from" not in parent.parents:
            raise ModelError(f"'{parent.name}' ({parent.kind}) publishes no model")
        parent = parent.parents["from"]
    return parent


def method_of(canonical: Mapping[str, Any]) -> Method:
    """Return the Method of a canonical dict."""
    return _cached_method(json.dumps(canonical))


@lru_cache(maxsize=1024)
def _cached_method(canonical: str) -> Method:
    return from_dict(json.loads(canonical))
