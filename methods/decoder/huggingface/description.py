"""What a Hugging Face folder's config.json says: the family, the sizes and the method. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from kvlab.methods.axis import Method, MethodError
from kvlab.methods.decoder.config import ConfigError, DecoderConfig
from kvlab.methods.decoder.huggingface.families import FAMILIES
from kvlab.methods.decoder.huggingface.family import Family
from kvlab.methods.decoder.huggingface.settings import CheckpointError, Settings
from kvlab.methods.registry import resolve
from kvlab.methods.sharing.layer_types import write_layer_types

CONFIG = "config.json"


class Description(NamedTuple):
    """What a folder holds.

    Attributes:
        family: the architecture. config: the model's sizes. method: what it was trained with.
        acting: the decoder of both, its keys and values shared, as the family describes it.
    """

    family: Family
    config: DecoderConfig
    method: Method
    acting: DecoderConfig


def read_config(folder: Path) -> DecoderConfig:
    """Read a folder's config.json.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported, by name.
    """
    return read_description(folder).config


def read_description(folder: Path) -> Description:
    """Read all that a folder's config.json says; raise as `read_config`."""
    settings = Settings.read(folder / CONFIG)
    named = settings.take("architectures", list, [])
    kind = settings.take("model_type", str, "")
    for family in FAMILIES:
        if family.architecture in named or (not named and family.model_type == kind):
            try:
                acting = family.read(settings)
                return Description(family, *_parted(acting), acting)
            except (ConfigError, MethodError) as error:
                raise CheckpointError(f"{settings.where}: {error}") from error
    found = ", ".join(map(str, named)) or kind or "none"
    known = ", ".join(f.architecture for f in FAMILIES)
    raise CheckpointError(f"{settings.where}: architecture {found} is not supported; {known} are")


def _parted(acting: DecoderConfig) -> tuple[DecoderConfig, Method]:
    """Part a decoder whose layers share keys and values into its sizes and the method."""
    if acting.sharing is None:
        return acting, resolve("full_attention")
    windows = acting.windows or (None,) * acting.layers
    window = next((window for window in windows if window), None)
    choice: dict[str, Any] = {
        "layers": write_layer_types(acting.kv_of, [w is not None for w in windows]),
        "window": window,
        "strict": acting.sharing.strict,
        "forward_passes": acting.sharing.forward_passes,
        "backward_passes": acting.sharing.backward_passes,
        "sequential": acting.sharing.sequential,
    }
    return acting.with_(sharing=None, windows=None), resolve({"cross_layer": choice})
