"""How well a model predicts the targets of windows, under the run-time axes of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import fixed
from kvlab.methods.cache.opening import scores_in_one_pass
from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.evaluate.scoring import first_predicted, parallel, stepwise
from kvlab.platform.jobs.evaluate.windows import Windows


def measure(
    model: LanguageModel,
    windows: Windows,
    method: Method,
    spec: Mapping[str, Any],
    device: torch.device,
    context: Context,
) -> dict[str, Any]:
    """Score the windows; a budget's share is of the window. See `summarise` for what is returned.

    Raises:
        JobError: the loss is not finite.
    """
    rows = windows.ids.shape[1] // model.method.span()
    nll = _score(model, windows, fixed(method, rows), spec["batch_size"], device, context)
    if not bool(nll.isfinite().all()):
        raise JobError("the model's loss on held-out text is not finite: its weights are broken")
    found = summarise(nll, windows, "loss_by_position" in spec["metrics"])
    return found | {"targets_in_mixed_blocks": windows.mixed(model.method.span())}


def _score(
    model: LanguageModel,
    windows: Windows,
    method: Method,
    size: int,
    device: torch.device,
    context: Context,
) -> Tensor:
    """Return [N, T] float64 on the CPU."""
    at_once = scores_in_one_pass(model.acting, method)
    parts = []
    for start in range(0, len(windows), size):
        batch = slice(start, start + size)
        ids, targets = windows.ids[batch].to(device), windows.targets[batch].to(device)
        if at_once:
            valid = windows.valid[batch]
            padding = None if bool(valid.all()) else valid.to(device)
            parts.append(parallel(model, ids, padding, targets, method).double().cpu())
        else:
            parts.append(_token_by_token(model, ids, targets, method, context))
        if context.stopping():
            raise Stopped
        context.progress(min(start + size, len(windows)), len(windows), "windows")
    return torch.cat(parts)


def _token_by_token(
    model: LanguageModel, ids: Tensor, targets: Tensor, method: Method, context: Context
) -> Tensor:
    prompt = first_predicted(model, ids)
    columns = []
    for column in stepwise(model, ids, targets, method, prompt):
        columns.append(column)
        if context.stopping():
            raise Stopped
    scored = torch.stack(columns, dim=1).double().cpu()
    return torch.cat((scored.new_zeros(len(ids), prompt), scored), dim=1)


def summarise(nll: Tensor, windows: Windows, by_position: bool) -> dict[str, Any]:
    """Return every figure that follows from the targets' losses.

    Args:
        nll: [N, T] float64, 0 where there is no target.
        by_position: whether to give the mean loss at each position (null where nothing is scored).
    """
    targets = windows.targets
    count, total = int(targets.sum()), float(nll.sum())
    size = int(windows.widths[targets].sum())
    per_window, window_targets = nll.sum(1), targets.sum(1)
    scored = window_targets > 0
    at, at_count = nll.sum(0), targets.sum(0)
    positions = [a / n if n else None for a, n in zip(at.tolist(), at_count.tolist(), strict=True)]
    return {
        "loss": total / count,
        "perplexity": exponential(total / count),
        "bits_per_byte": total / size / math.log(2) if size else None,
        "perplexity_per_byte": exponential(total / size) if size else None,
        "targets": {
            "hash": windows.digest(),
            "count": count,
            "bytes": size,
            "first_target": windows.first_target,
        },
        "loss_by_position": positions if by_position else None,
        "window_losses": (per_window[scored] / window_targets[scored]).tolist(),
        "window_targets": window_targets[scored].tolist(),
        "window_documents": windows.documents[scored].tolist(),
    }


def exponential(value: float) -> float | None:
    """e to the value; None where that is beyond a float (JSON has no infinity)."""
    return math.exp(value) if value < 700 else None
