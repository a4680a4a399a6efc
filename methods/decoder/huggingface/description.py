"""What a Hugging Face folder's config.json says: the family and the sizes. No torch."""

from __future__ import annotations

from pathlib import Path

from kvlab.methods.decoder.config import ConfigError, DecoderConfig
from kvlab.methods.decoder.huggingface.families import FAMILIES
from kvlab.methods.decoder.huggingface.family import Family
from kvlab.methods.decoder.huggingface.settings import CheckpointError, Settings

CONFIG = "config.json"


def read_config(folder: Path) -> DecoderConfig:
    """Read a folder's config.json.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported, by name.
    """
    return read_description(folder)[1]


def read_description(folder: Path) -> tuple[Family, DecoderConfig]:
    """Read a folder's config.json: which family it is of, and its sizes."""
    settings = Settings.read(folder / CONFIG)
    named = settings.take("architectures", list, [])
    kind = settings.take("model_type", str, "")
    for family in FAMILIES:
        if family.architecture in named or (not named and family.model_type == kind):
            try:
                return family, family.read(settings)
            except ConfigError as error:
                raise CheckpointError(f"{settings.where}: {error}") from error
    found = ", ".join(map(str, named)) or kind or "none"
    known = ", ".join(f.architecture for f in FAMILIES)
    raise CheckpointError(f"{settings.where}: architecture {found} is not supported; {known} are")
