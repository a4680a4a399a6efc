"""From our decoder to a folder that transformers loads."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.huggingface import lckv
from kvlab.methods.decoder.huggingface.description import CONFIG
from kvlab.methods.decoder.huggingface.families import FAMILIES
from kvlab.methods.decoder.huggingface.family import Family
from kvlab.methods.decoder.huggingface.reader import WEIGHTS, by_head
from kvlab.methods.decoder.huggingface.settings import CheckpointError, Settings
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.model import LanguageModel
from kvlab.methods.weights import write_tensors


def write_checkpoint(model: LanguageModel, folder: Path) -> str:
    """Write config.json and model.safetensors into an existing folder; return the architecture.

    Raises:
        CheckpointError: no supported architecture can say all of the model's config.
    """
    if not isinstance(model, TokenModel):
        raise CheckpointError(f"a {type(model).__name__} has no Hugging Face architecture")
    acting = lckv.without_own(model.acting)
    family = family_of(acting)
    tensors = _tensors(model, family)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **family.write(acting),
    }
    write_tensors(tensors, folder / WEIGHTS, format="pt")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return family.architecture


def family_of(config: DecoderConfig) -> Family:
    """Return the first family that reads back exactly this config from what it writes of it."""
    for family in FAMILIES:
        try:
            if _read_back(config, family) == config:
                return family
        except CheckpointError:
            continue
    if config.sharing is not None:
        back = _read_back(config, lckv.FAMILY)
        lost = [f.name for f in fields(config) if getattr(back, f.name) != getattr(config, f.name)]
        raise CheckpointError(
            f"a model with shared KV layers can only be exported as {lckv.FAMILY.model_type}, "
            f"which cannot say its {', '.join(lost)}"
        )
    known = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(f"no Hugging Face architecture has these settings: tried {known}")


def _read_back(config: DecoderConfig, family: Family) -> DecoderConfig:
    return family.read(Settings(family.write(config), family.architecture))


def _tensors(model: TokenModel, family: Family) -> dict[str, Tensor]:
    config, ours = model.acting, model.decoder.state_dict()
    theirs: dict[str, Tensor] = {}
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for names in family.names(config):
        tensor = ours[names.ours]
        if names.per_head:
            theirs[names.theirs[0]] = by_head(tensor, config)
        elif len(names.theirs) == 1:
            theirs[names.theirs[0]] = tensor
        else:
            parts = tensor.split((queries, keys, keys))
            theirs |= dict(zip(names.theirs, parts, strict=True))
    return theirs
