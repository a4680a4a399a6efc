"""The evaluate job: how well a model predicts held-out text, on targets common to all arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.cache.opening import scores_in_one_pass
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import from_dict
from kvlab.methods.store import load
from kvlab.platform.data import corpus
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.evaluate.scoring import first_predicted, parallel, stepwise
from kvlab.platform.jobs.evaluate.windows import Windows, cut


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Score the model of parent "of" on the held-out part of parent "data".

    Args:
        spec: sequence_length and tokens (of the windows), first_target (the first position that
            every arm of this job predicts), batch_size (windows), apply (run-time axes), metrics,
            dtype (of the model; losses are summed in float64).

    Returns:
        loss (nats per target), perplexity, bits_per_byte, perplexity_per_byte, targets (hash,
        count, bytes, first_target), targets_in_mixed_blocks (their share in blocks of this model
        that hold the end of one document and the beginning of another), loss_by_position,
        window_losses, window_targets, window_documents (which each begins in), environment.

    Raises:
        JobError: another tokenizer's data, or nothing to score.
    """
    device = environment.prepare(context, spec["seed"])
    dtype = torch_dtype(spec["dtype"], device)
    model = load(context.inputs["of"], device=str(device), dtype=dtype).eval()
    held = corpus.load(context.inputs["data"], "heldout")
    if held.vocab_size > model.config.vocab_size:
        raise JobError(
            f"the data's tokenizer has {held.vocab_size} tokens, the model's vocabulary "
            f"{model.config.vocab_size}: use the model's own tokenizer"
        )
    windows = cut(held, spec["sequence_length"], spec["tokens"], spec["first_target"])
    if not bool(windows.targets.any()):
        raise JobError(
            f"nothing to score: {held.tokens.numel()} held-out tokens give no target at position "
            f"{spec['first_target']} or later; raise data.holdout or give more text"
        )
    nll = _score(model, windows, spec, context, device)
    if not bool(nll.isfinite().all()):
        raise JobError("the model's loss on held-out text is not finite: its weights are broken")
    by_position = "loss_by_position" in spec["metrics"]
    return {
        **summarise(nll, windows, by_position),
        "targets_in_mixed_blocks": windows.mixed(model.method.span()),
        "environment": environment.capture(context, dtype=str(dtype).removeprefix("torch.")),
    }


def _score(
    model: LanguageModel,
    windows: Windows,
    spec: Mapping[str, Any],
    context: Context,
    device: torch.device,
) -> Tensor:
    """Return [N, T] float64 on the CPU."""
    method = from_dict(spec["apply"])
    at_once = scores_in_one_pass(model.acting, method)
    size = spec["batch_size"]
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
        "perplexity": _exp(total / count),
        "bits_per_byte": total / size / math.log(2) if size else None,
        "perplexity_per_byte": _exp(total / size) if size else None,
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


def _exp(value: float) -> float | None:
    """e to the value; None where that is beyond a float (JSON has no infinity)."""
    return math.exp(value) if value < 700 else None
