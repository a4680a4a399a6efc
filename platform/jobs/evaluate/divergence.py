"""How far a cache's cut moves a model from what it says with its full cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.model import LanguageModel
from kvlab.platform.jobs.context import Context, JobError, Stopped
from kvlab.platform.jobs.evaluate.perplexity import exponential
from kvlab.platform.jobs.evaluate.windows import Windows

WORST = 5
"""Windows that a result names as the worst."""
LOOK_EVERY = 16
"""Steps of generation between two looks at whether all windows have parted."""


class Step(NamedTuple):
    """One position of a batch of windows, each [B]; zero where nothing is scored.

    kl: nats, float64. same: whether both name the same likeliest token. full, applied: minus the
    log probability of the text's own token, nats, float64.
    """

    kl: Tensor
    same: Tensor
    full: Tensor
    applied: Tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """What was found, for windows [N] and positions [P] from the prompt's end on; on the CPU.

    Attributes:
        scored: [N, P] bool. kl, same, full, applied: [N, P] float64 as in `Step`.
        identical: [N] int64, tokens of greedy continuation until the first that differs.
    """

    scored: Tensor
    kl: Tensor
    same: Tensor
    full: Tensor
    applied: Tensor
    identical: Tensor


def after_prompt(windows: Windows, prompt: int) -> Tensor:
    """Return the numbers [N] of the windows that have a target behind `prompt` tokens.

    Raises:
        JobError: no window has.
    """
    fitting = windows.targets[:, prompt:].any(1)
    if not bool(fitting.any()):
        raise JobError(
            f"nothing to score: no held-out window has a target after a prompt of {prompt} "
            "tokens; give a shorter prompt or more text"
        )
    return fitting.nonzero()[:, 0]


def measure(
    model: LanguageModel,
    windows: Windows,
    method: Method,
    spec: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
    context: Context,
) -> dict[str, Any]:
    """Compare the cache under `method` with the full one, and return the result's `divergence`.

    The full cache is run once, not beside itself.

    Args:
        spec: prompt (tokens that are prefilled), generate (tokens that are generated at most).

    Raises:
        JobError: nothing to score, or a divergence that is not finite.
    """
    chosen, prompt = after_prompt(windows, spec["prompt"]), spec["prompt"]
    other = method if method.to_dict() else None
    parts: list[Divergence] = []
    for numbers in torch.split(chosen, batch_size):
        ids = windows.ids[numbers].to(device)
        scored = windows.targets[numbers, prompt:]
        steps = []
        for step in _forced(model, ids, scored.to(device), prompt, other):
            steps.append(step)
            if context.stopping():
                raise Stopped
        kl, same, full, applied = (torch.stack(each, 1).cpu() for each in zip(*steps, strict=True))
        identical = _identical(model, ids[:, :prompt], spec["generate"], other)
        parts.append(Divergence(scored, kl, same, full, applied, identical.cpu()))
        done = sum(len(part.identical) for part in parts)
        context.progress(done, len(chosen), "windows against the full cache")
    names = Divergence.__dataclass_fields__
    whole = Divergence(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    if not bool(whole.kl.isfinite().all()):
        raise JobError(
            "the divergence from the full cache is not finite: the model's weights are broken, "
            "or too large for the dtype"
        )
    return summarise(whole, windows, chosen, spec)


@torch.inference_mode()
def _forced(
    model: LanguageModel, ids: Tensor, scored: Tensor, prompt: int, other: Method | None
) -> Iterator[Step]:
    """Prefill `prompt` tokens of windows [B, T] under both caches and give both the rest."""
    length = ids.shape[1]
    sessions = [
        model.start(ids[:, :prompt], new_tokens=length - prompt, apply=apply)
        for apply in ((None,) if other is None else (None, other))
    ]
    for place in range(prompt, length):
        found = [F.log_softmax(session.logits.double(), -1) for session in sessions]
        full, applied = found[0], found[-1]
        counted = scored[:, place - prompt]
        target = ids[:, place]
        kl = (full.exp() * (full - applied)).sum(-1).clamp(min=0)
        same = full.argmax(-1) == applied.argmax(-1)
        nll = [F.nll_loss(p, target, reduction="none") for p in (full, applied)]
        values = (kl, same.double(), *nll)
        yield Step(*(each.masked_fill(~counted, 0.0) for each in values))
        if place + 1 < length:
            for session in sessions:
                session.step(target)


@torch.inference_mode()
def _identical(model: LanguageModel, prompts: Tensor, most: int, other: Method | None) -> Tensor:
    """Return [B]: tokens that greedy generation from both caches has in common at the beginning."""
    if other is None:
        return torch.full((len(prompts),), most)
    both = [model.start(prompts, new_tokens=most - 1, apply=apply) for apply in (None, other)]
    together = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    length = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
    for step in range(most):
        full, applied = (session.logits.argmax(-1) for session in both)
        together &= full == applied
        length += together
        if step + 1 == most or (step % LOOK_EVERY == LOOK_EVERY - 1 and not bool(together.any())):
            break
        # Once they have parted, what follows does not matter.
        for session in both:
            session.step(full)
    return length


def summarise(
    found: Divergence, windows: Windows, chosen: Tensor, spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every figure that follows from the windows' divergences.

    Args:
        chosen: the numbers [N] of the windows in `windows` that `found` is about.
    """
    count, at = int(found.scored.sum()), found.scored.sum(0)
    targets = found.scored.sum(1)

    def by_position(values: Tensor) -> list[float | None]:
        pairs = zip(values.sum(0).tolist(), at.tolist(), strict=True)
        return [total / n if n else None for total, n in pairs]

    by_window = {
        "kl": found.kl.sum(1) / targets,
        "top1_agreement": found.same.sum(1) / targets,
        "identical_tokens": found.identical,
        "losses": found.applied.sum(1) / targets,
        "full_losses": found.full.sum(1) / targets,
    }
    documents = windows.documents[chosen]
    order = by_window["kl"].argsort(descending=True, stable=True)[:WORST]
    full, applied = float(found.full.sum()) / count, float(found.applied.sum()) / count
    return {
        "prompts": {
            "hash": _digest(windows, chosen, spec),
            "count": len(chosen),
            "prompt": spec["prompt"],
            "generate": spec["generate"],
            "targets": count,
        },
        "kl": float(found.kl.sum()) / count,
        "top1_agreement": float(found.same.sum()) / count,
        "identical_tokens": float(found.identical.double().mean()),
        "loss": applied,
        "full_loss": full,
        "perplexity": exponential(applied),
        "full_perplexity": exponential(full),
        "by_position": {
            "kl": by_position(found.kl),
            "top1_agreement": by_position(found.same),
            "loss": by_position(found.applied),
            "full_loss": by_position(found.full),
        },
        "windows": {name: values.tolist() for name, values in by_window.items()}
        | {"targets": targets.tolist(), "documents": documents.tolist()},
        "worst_windows": [
            {
                "window": int(chosen[i]),
                "document": int(documents[i]),
                "kl": float(by_window["kl"][i]),
                "top1_agreement": float(by_window["top1_agreement"][i]),
                "identical_tokens": int(found.identical[i]),
            }
            for i in order.tolist()
        ],
    }


def _digest(windows: Windows, chosen: Tensor, spec: Mapping[str, Any]) -> str:
    digest = sha256(f"{spec['prompt']} {spec['generate']} {tuple(windows.ids.shape)}".encode())
    digest.update(windows.ids[chosen].to(torch.int32).numpy().tobytes())
    digest.update(windows.targets[chosen, spec["prompt"] :].numpy().tobytes())
    return digest.hexdigest()
