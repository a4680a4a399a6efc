"""Minus log probabilities of windows, in one pass or token by token through the live cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import JobError


@torch.inference_mode()
def parallel(
    model: LanguageModel,
    ids: Tensor,
    valid: Tensor | None,
    targets: Tensor,
    apply: Method | None = None,
) -> Tensor:
    """Score windows [B, T] in one pass; return [B, T] float32, 0 where there is no target.

    Args:
        apply: run-time axes whose rule stands for what a live cache would have evicted.

    Raises:
        JobError: the model does not predict one of the targets.
    """
    score = model(ids, valid, apply)
    if bool((targets & ~score.scored).any()):
        place = int((targets & ~score.scored).nonzero()[0, 1])
        raise JobError(f"the model does not predict position {place}: first_target is too early")
    return torch.as_tensor(score.nll.float().masked_fill(~targets, 0.0))


@torch.inference_mode()
def stepwise(
    model: LanguageModel, ids: Tensor, targets: Tensor, apply: Method, prompt: int
) -> Iterator[Tensor]:
    """Score windows [B, T] as they would be generated, under the run-time axes of `apply`.

    The first `prompt` tokens are prefilled, all others given one by one, so a policy evicts what it
    would evict in use. Padding stands at the end of windows and follows all targets.

    Yields:
        For each position from `prompt` on, [B] float32: 0 where there is no target.
    """
    length = ids.shape[1]
    session = model.start(ids[:, :prompt], new_tokens=length - prompt, apply=apply)
    for place in range(prompt, length):
        nll = F.cross_entropy(session.logits.float(), ids[:, place], reduction="none")
        yield nll.masked_fill(~targets[:, place], 0.0)
        if place + 1 < length:
            session.step(ids[:, place])


def first_predicted(model: LanguageModel, ids: Tensor) -> int:
    """Return the first position of windows [B, T] that the model predicts."""
    with torch.inference_mode():
        scored = model(ids[:1]).scored[0]
    return int(scored.nonzero()[0])
