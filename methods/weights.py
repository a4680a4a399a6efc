"""Weights between safetensors files and modules, with errors that name the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from kvlab import KvlabError

Module = TypeVar("Module", bound=nn.Module)


class WeightsError(KvlabError):
    """A weights file that cannot be read, or that does not fit its model."""


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        WeightsError: naming the file, if it is missing, cut off or no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: no readable safetensors file ({error})") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, format: str | None = None) -> None:
    """Write a safetensors file; `format` goes into its metadata ("pt" for transformers)."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": format} if format else None)


def without_weights(build: Callable[[], Module]) -> Module:
    """Build a module whose parameters `fill` will replace: no memory, no random numbers drawn."""
    with torch.device("meta"):
        return build()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Make tensors the parameters of a module, in their own dtype.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise WeightsError(f"{where}: tensor '{name}' is missing")
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"{where}: tensor '{name}' must be {list(tensor.shape)}, "
                f"found {list(tensors[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise WeightsError(f"{where}: tensor '{name}' is {tensors[name].dtype}, not a float")
    if unknown := sorted(set(tensors) - set(expected)):
        raise WeightsError(f"{where}: tensor '{unknown[0]}' has no place in this model")
    module.load_state_dict(dict(tensors), assign=True)
    module.requires_grad_(True)
