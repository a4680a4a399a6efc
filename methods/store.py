"""Models on disk: `model.safetensors` (weights) and `model.json` (config and method)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kvlab import KvlabError
from kvlab.methods.build import build
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import from_dict
from kvlab.methods.weights import fill, read_tensors, without_weights, write_tensors

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
HUGGING_FACE = "config.json"


class StoreError(KvlabError):
    """A folder that holds no model we can load."""


def save(model: LanguageModel, folder: Path) -> None:
    """Write `model.safetensors` and `model.json` into an existing folder.

    The description comes last, so a folder that has one is whole; whoever needs more (several
    processes, crashes) writes into a new folder and renames it.
    """
    write_tensors(model.state_dict(), folder / WEIGHTS)
    text = json.dumps(model.describe(), indent=2, sort_keys=True)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load(
    folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load a folder that `save` wrote, or a Hugging Face checkpoint folder.

    Args:
        folder: what to load.
        device: where to put it.
        dtype: of the weights; None keeps the stored one.

    Raises:
        KvlabError: one line naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        model = _load(folder)
    elif (folder / HUGGING_FACE).exists():
        from kvlab.methods.decoder.huggingface.reader import read_checkpoint

        model = read_checkpoint(folder)
    else:
        raise StoreError(f"{folder}: holds no model (neither {DESCRIPTION} nor {HUGGING_FACE})")
    return model.to(device=device, dtype=dtype)


def load_config(folder: Path | str) -> DecoderConfig:
    """Read the sizes of a folder that `load` would load; weights stay unread."""
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        return _described(folder / DESCRIPTION)[0]
    from kvlab.methods.decoder.huggingface.description import read_config

    return read_config(folder)


def _load(folder: Path) -> LanguageModel:
    path = folder / DESCRIPTION
    config, written = _described(path)
    try:
        model = without_weights(lambda: build(config, from_dict(written)))
    except (KvlabError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: {error}") from error
    fill(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model


def _described(path: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a description: the config, and the method's canonical form."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        return DecoderConfig.from_dict(description["config"]), description["method"]
    except KeyError as error:
        raise StoreError(f"{path}: {error} is missing") from error
    except (OSError, ValueError, RecursionError, TypeError, KvlabError) as error:
        raise StoreError(f"{path}: no readable model description ({error})") from error
