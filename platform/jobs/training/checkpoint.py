"""A training run on disk: weights, optimizer and random state as safetensors, the rest as JSON."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.platform.jobs.training.gang import assign, sharded_like, whole

TENSORS = "state.safetensors"
PROGRESS = "progress.json"


class CheckpointError(KvlabError):
    """A checkpoint that belongs to another model."""


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all state as whole CPU tensors, so that any number of workers may go on from it.

    Every rank must call it: shards are gathered. Frozen weights are not part of it.
    """
    names: dict[Tensor, str] = {p: name for name, p in _trained(module)}
    tensors = {f"model.{name}": whole(p) for p, name in names.items()}
    tensors |= {f"buffer.{name}": whole(b) for name, b in _plain(module).named_buffers()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{names[parameter]}.{key}"] = whole(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write a checkpoint into an empty folder."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSORS)
    (folder / PROGRESS).write_text(json.dumps(progress))


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's state in place and return its progress.

    Raises:
        CheckpointError: it is of another model.
        OSError: it cannot be read now, or is damaged. Damaged, it is removed: the next attempt
            takes an older one or begins anew.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / TENSORS)
        progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    except (FileNotFoundError, ValueError, RecursionError, SafetensorError) as error:
        if "os error" in str(error).lower():  # the disk's, not the content's
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(errno.EIO, f"checkpoint {folder}: not readable, removed ({error})") from None
    trained = dict(_trained(module))
    wanted = {f"model.{name}" for name in trained}
    found = {name for name in tensors if name.startswith("model.")}
    if wanted != found:
        odd = sorted(wanted ^ found)[0]
        raise CheckpointError(f"checkpoint {folder}: is of another model ('{odd}' differs)")
    for name, parameter in trained.items():
        assign(parameter, tensors[f"model.{name}"])
    for name, buffer in _plain(module).named_buffers():
        assign(buffer, tensors[f"buffer.{name}"])
    _restore_optimizer(optimizer, {p: name for name, p in trained.items()}, tensors)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return progress


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(ordered):
        prefix = f"optimizer.{names[parameter]}."
        held = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if held:
            state[index] = {
                key: sharded_like(parameter, t) if t.shape == parameter.shape else t
                for key, t in held.items()
            }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters under names that do not depend on how the module is wrapped."""
    return [(n, p) for n, p in _plain(module).named_parameters() if p.requires_grad]


def _plain(module: nn.Module) -> nn.Module:
    wrapped = getattr(module, "module", module)
    return wrapped if isinstance(wrapped, nn.Module) else module
