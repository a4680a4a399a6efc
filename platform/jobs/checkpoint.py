"""Checkpoint folders people have, checked without loading a weight: sizes, files, content."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlab import KvlabError
from kvlab.methods.axis import MethodError
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import from_dict

if TYPE_CHECKING:
    from kvlab.methods.decoder.huggingface.description import Description

OURS = "model.json"
THEIRS = "config.json"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100 * 2**20


class CheckpointError(KvlabError):
    """A checkpoint folder that kvlab cannot use."""


@lru_cache(maxsize=64)
def read_config(folder: Path) -> DecoderConfig:
    """Return the sizes of the model in a kvlab or Hugging Face folder.

    Raises:
        CheckpointError: no folder, no description, or another architecture.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint: no folder at '{folder}'")
    if (folder / OURS).is_file():
        raw = _json(folder / OURS).get("config")
        if not isinstance(raw, dict):
            raise CheckpointError(f"checkpoint: {folder / OURS} has no 'config'")
        return _config(folder / OURS, raw)
    if (folder / THEIRS).is_file():
        return _foreign(folder).config
    raise CheckpointError(f"checkpoint: '{folder}' holds neither {OURS} nor {THEIRS}")


def trained_method(folder: Path) -> dict[str, Any]:
    """Return the canonical train-time method of a checkpoint; {} is full attention.

    Raises:
        CheckpointError: the folder cannot be read, or its method is none.
    """
    if not (folder / OURS).is_file():
        return _foreign(folder).method.to_dict()
    try:
        return from_dict(_json(folder / OURS).get("method") or {}).to_dict()
    except (MethodError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint: {folder / OURS}: 'method': {error}") from None


def written(canonical: Mapping[str, Any]) -> str:
    """Return what a workflow says for a canonical method: YAML on one line, without defaults."""
    return json.dumps(
        {
            choice.value.name: {
                column.name: getattr(choice.params, column.name)
                for column in fields(choice.params)
                if getattr(choice.params, column.name) != column.default
            }
            for choice in from_dict(canonical).choices.values()
            if not choice.is_default
        }
    )


def _foreign(folder: Path) -> Description:
    from kvlab.methods.decoder.huggingface.description import read_description

    try:
        return read_description(folder)
    except KvlabError as error:
        raise CheckpointError(f"checkpoint: {error}") from None


def _config(path: Path, raw: dict[str, Any]) -> DecoderConfig:
    try:
        return DecoderConfig.from_dict(raw)
    except (KvlabError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {path}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sharded or not.

    Raises:
        CheckpointError: none, or one that the index names is not there.
    """
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"checkpoint: {folder / INDEX} has no 'weight_map'")
        names = sorted(set(map(str, shards.values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(
                f"checkpoint: {folder / INDEX}: '{outside[0]}' is not a file name in this folder"
            )
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"checkpoint: '{folder}' holds no .safetensors file; convert other formats with "
            "`save_pretrained(FOLDER, safe_serialization=True)`"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"checkpoint: '{folder}' lacks {', '.join(missing)}")
    return files


def check_weights(folder: Path) -> None:
    """Check that every weight file is whole: a header that parses and the bytes it promises.

    Raises:
        CheckpointError: naming the file and what is wrong.
    """
    for file in weight_files(folder):
        if reason := _corrupt(file):
            raise CheckpointError(f"checkpoint: {file} is no whole safetensors file: {reason}")


def _corrupt(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            return f"its header would be {length} bytes of {size}"
        try:
            header = json.loads(stream.read(length))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
            promised = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            return "its header is not the JSON of one"
    return None if promised == size else f"its header promises {promised} bytes, found {size}"


def fingerprint(folder: Path) -> str:
    """Return the hex digest of a checkpoint's description and weights, by content."""
    digest = sha256()
    for file in [*_descriptions(folder), *weight_files(folder)]:
        digest.update(file.name.encode() + b"\0" + file_digest(file).encode())
    return digest.hexdigest()


def _descriptions(folder: Path) -> Iterable[Path]:
    return [folder / name for name in (OURS, THEIRS) if (folder / name).is_file()]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        digest = sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} is not readable JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"checkpoint: {path} is not a JSON object")
    return raw
