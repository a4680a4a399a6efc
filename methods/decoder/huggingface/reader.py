"""From a Hugging Face checkpoint folder to our decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.huggingface.description import read_description
from kvlab.methods.decoder.huggingface.family import Names
from kvlab.methods.decoder.huggingface.settings import CheckpointError
from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.weights import fill, read_tensors, without_weights

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_checkpoint(folder: Path) -> TokenModel:
    """Read a checkpoint folder: config.json and safetensors, in one file or in shards.

    The model's dtype is the checkpoint's; the widest where tensors differ.

    Raises:
        CheckpointError, WeightsError: naming the file and what is wrong with it.
    """
    family, config, method, acting = read_description(folder)
    theirs = _Tensors(folder, family.ignored, family.discarded(acting))
    ours = {f"decoder.{n.ours}": theirs.take(n, acting) for n in family.names(acting)}
    if config.tie_embeddings:
        theirs.drop_tied_head(ours["decoder.embedding.weight"])
    theirs.close()
    widest = max((t.dtype for t in ours.values()), key=lambda dtype: dtype.itemsize)
    ours = {name: tensor.to(widest) for name, tensor in ours.items()}
    model = without_weights(lambda: TokenModel(config, method))
    fill(model, ours, folder)
    return model


class _Tensors:
    """The tensors of a checkpoint, handed out once each."""

    def __init__(self, folder: Path, ignored: tuple[str, ...], discarded: frozenset[str]) -> None:
        self._files = _files(folder)
        self._where = folder / (INDEX if (folder / INDEX).exists() else WEIGHTS)
        self._left: dict[str, Tensor] = {}
        for file in self._files:
            self._left |= read_tensors(file)
        self._left = {
            k: v for k, v in self._left.items() if k not in discarded and not k.endswith(ignored)
        }

    def take(self, names: Names, config: DecoderConfig) -> Tensor:
        """Remove theirs and return ours."""
        parts = []
        for name in names.theirs:
            if name not in self._left:
                raise CheckpointError(f"{self._where}: tensor '{name}' is missing")
            parts.append(self._left.pop(name))
        if not names.per_head:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return by_part(parts[0], config)

    def drop_tied_head(self, embedding: Tensor) -> None:
        """Let go of a head that is stored although it is tied; refuse one that differs."""
        for name in ("lm_head.weight", "embed_out.weight"):
            head = self._left.pop(name, None)
            if head is not None and not torch.equal(head, embedding):
                raise CheckpointError(
                    f"{self._where}: '{name}' differs from the embeddings it is said to be tied to"
                )

    def close(self) -> None:
        if self._left:
            raise CheckpointError(
                f"{self._where}: tensor '{min(self._left)}' is not part of this architecture"
            )


def by_part(fused: Tensor, config: DecoderConfig) -> Tensor:
    """Reorder rows [head, (q, k, v), D] to [(q, k, v), head, D]."""
    split = fused.reshape(config.heads, 3, config.head_dim, -1)
    return split.transpose(0, 1).reshape(fused.shape)


def by_head(fused: Tensor, config: DecoderConfig) -> Tensor:
    """Undo `by_part`."""
    split = fused.reshape(3, config.heads, config.head_dim, -1)
    return split.transpose(0, 1).reshape(fused.shape)


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
        return [folder / WEIGHTS]
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: no readable index ({error!r})") from error
    names = set(weight_map.values()) if isinstance(weight_map, Mapping) else set()
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file name in this folder")
    if not names:
        raise CheckpointError(f"{index}: 'weight_map' names no file")
    return [folder / name for name in sorted(names)]
