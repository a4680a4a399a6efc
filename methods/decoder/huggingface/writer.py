"""From our decoder to a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from kvlab.methods.decoder.config import DecoderConfig
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
    family = family_of(model.config)
    tensors = _tensors(model, family)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **family.write(model.config),
    }
    write_tensors(tensors, folder / WEIGHTS, format="pt")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return family.architecture


def family_of(config: DecoderConfig) -> Family:
    """Return the first family that reads back exactly this config from what it writes of it."""
    for family in FAMILIES:
        try:
            if family.read(Settings(family.write(config), family.architecture)) == config:
                return family
        except CheckpointError:
            continue
    known = ", ".join(family.architecture for family in FAMILIES)
    raise CheckpointError(f"no Hugging Face architecture has these settings: tried {known}")


def _tensors(model: TokenModel, family: Family) -> dict[str, Tensor]:
    config, ours = model.config, model.decoder.state_dict()
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
