"""The dtype in which a finished model is used: one default for what is scored and what is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from kvlab.platform.jobs.kind import Surroundings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def dtype_of(written: str, around: Surroundings) -> str:
    """Return what `auto` stands for where a job will run: bfloat16 on a GPU, float32 without."""
    if written != "auto":
        return written
    return "bfloat16" if around.resources.gpus else "float32"


def torch_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype of a spec's `dtype`; `auto` follows the device."""
    import torch

    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return found[asked]
