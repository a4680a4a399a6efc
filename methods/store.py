"""Models on disk: `model.safetensors` (weights) and `model.json` (config and method)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.axis import from_dict
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.model import LanguageModel

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"


class StoreError(KvlabError):
    """A model folder that cannot be read."""


def save(model: LanguageModel, folder: Path) -> None:
    """Write `model.safetensors` and `model.json` into an existing folder."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps(model.describe(), indent=2, sort_keys=True)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load(
    folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load a folder that `save` wrote, or a Hugging Face checkpoint folder.

    Raises:
        StoreError: one line naming the file and what is wrong with it.
    """
    folder = Path(folder)
    description = _description(folder / DESCRIPTION)
    config = DecoderConfig.from_dict(description["config"])
    model = build(config, from_dict(description["method"]))
    model.load_state_dict(_tensors(folder / WEIGHTS))
    return model.to(device=device, dtype=dtype)


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: no readable model description ({error})") from error
    return dict(description)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: no readable safetensors file ({error})") from error
