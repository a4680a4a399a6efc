"""The controller job: ADORE's controller, trained to tell what full attention will attend to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kvlab.methods.decoder.language_model import TokenModel
from kvlab.methods.eviction.adore.controller import Controller
from kvlab.methods.eviction.adore.sizes import ControllerConfig
from kvlab.methods.store import load
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.context import Context, Diverged, JobError, Stopped
from kvlab.platform.jobs.label.recall import Recalls, kept_for
from kvlab.platform.jobs.label.run import FILE, RIVALS

MOST_WEIGHT = 100.0
"""Of a token that matters beside one that does not, in the loss."""
WARM_UP = 0.05
LOG_EVERY = 20


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train on the labels of parent "labels", over the embeddings of parent "of".

    Args:
        spec: state, hidden, position, match (see `ControllerConfig`), epochs, batch_size (texts),
            queries (tokens of each that are scored for), learning_rate, seed.

    Publishes the controller; see `Controller.save`.

    Returns:
        parameters, bytes, steps, loss (mean of the last steps); recall (m -> share), precision, and
        rivals (as the label job measured them), all on held-out texts; top; environment.

    Raises:
        Diverged: the loss is not finite.
        JobError: the model has no token embeddings of its own.
    """
    device = environment.prepare(context, spec["seed"])
    model = load(context.inputs["of"], dtype=torch.float32).eval()
    if not isinstance(model, TokenModel):
        raise JobError("a controller reads the embeddings of a model over tokens")
    labels = load_file(context.inputs["labels"] / FILE)
    config = ControllerConfig(
        model.config.vocab_size, model.config.width, spec["state"], spec["hidden"],
        spec["position"], spec["match"], labels["train.labels"].shape[1],
    )  # fmt: skip
    controller = Controller(config).to(device)
    assert model.decoder.embedding is not None
    table = model.decoder.embedding.weight.detach().to(device)
    loss, steps = _train(controller, table, labels, spec, context)
    controller.eval()
    found = _recall(controller, table, labels, context)
    controller.save(context.folder)
    return {
        "parameters": config.parameters,
        "bytes": controller.nbytes(),
        "steps": steps,
        "loss": loss,
        "top": labels["train.labels"].shape[-1],
        **found["controller"],
        "rivals": json.loads((context.inputs["labels"] / RIVALS).read_bytes()),
        "environment": environment.capture(context, dtype="float32"),
    }


def _train(
    controller: Controller,
    table: Tensor,
    labels: Mapping[str, Tensor],
    spec: Mapping[str, Any],
    context: Context,
) -> tuple[float, int]:
    """Return the mean loss of the last steps, and how many there were."""
    texts, places = labels["train.ids"].long(), labels["train.labels"].long()
    generator = torch.Generator().manual_seed(spec["seed"] or 0)
    each = math.ceil(len(texts) / spec["batch_size"])
    steps = each * spec["epochs"]
    optimizer = torch.optim.AdamW(controller.parameters(), lr=spec["learning_rate"])
    losses: list[float] = []
    for step in range(steps):
        if step % each == 0:
            order = torch.randperm(len(texts), generator=generator)
        rows = order[(step % each) * spec["batch_size"] :][: spec["batch_size"]]
        current = _asked(len(rows), texts.shape[1], spec["queries"], generator)
        for group in optimizer.param_groups:
            group["lr"] = spec["learning_rate"] * _rate(step, steps)
        loss = _loss(controller, table, texts[rows], places[rows], current)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(controller.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise Diverged(f"step {step + 1} of {steps}: loss {losses[-1]:g}: lower learning_rate")
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            context.log({"loss": losses[-1]}, step + 1)
            context.progress(step + 1, steps, f"loss {losses[-1]:.3f}")
        if context.stopping():
            raise Stopped
    last = losses[-LOG_EVERY:]
    return math.fsum(last) / len(last), steps


def _asked(batch: int, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens that are scored for [batch, count], all but the first, which has no past."""
    drawn = torch.rand(batch, length - 1, generator=generator)
    return 1 + drawn.topk(min(count, length - 1)).indices


def _rate(step: int, steps: int) -> float:
    """Warmed up, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _loss(
    controller: Controller, table: Tensor, ids: Tensor, places: Tensor, current: Tensor
) -> Tensor:
    """Binary cross-entropy over the tokens so far, the few that matter as heavy as the many.

    Args: ids: [B, T]. places: [B, L, T, top]. current: [B, Q].
    """
    device = table.device
    logits = controller(F.embedding(ids.to(device), table), current.to(device))
    marks, past = _marks(places, current, ids.shape[1])
    marks, past = marks.to(device), past.to(device)
    wanted = marks.sum()
    others = past.sum() * marks.shape[1] - wanted
    weight = (others / wanted.clamp_min(1)).clamp(1.0, MOST_WEIGHT)
    losses = F.binary_cross_entropy_with_logits(
        logits, marks.float(), pos_weight=weight, reduction="none"
    )
    return (losses * past).sum() / (past.sum() * marks.shape[1])


def _marks(places: Tensor, current: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which tokens matter to the current ones [B, L, Q, T]; which stand before them [B, 1, Q, T].

    Args: places: [B, L, T, top]. current: [B, Q].
    """
    index = current[:, None, :, None].expand(-1, places.shape[1], -1, places.shape[-1])
    asked = places.gather(2, index)
    spare = torch.where(asked < 0, length, asked)
    shape = (*asked.shape[:-1], length + 1)
    marks = torch.zeros(shape, dtype=torch.bool).scatter_(-1, spare, True)[..., :length]
    return marks, (torch.arange(length) <= current.unsqueeze(-1)).unsqueeze(1)


@torch.no_grad()
def _recall(
    controller: Controller, table: Tensor, labels: Mapping[str, Tensor], context: Context
) -> dict[str, dict[str, object]]:
    """Measure the controller on the held-out texts, for every token of them."""
    texts, places = labels["heldout.ids"].long(), labels["heldout.labels"].long()
    length = texts.shape[1]
    found = Recalls(kept_for(places.shape[-1], length))
    for number in range(len(texts)):
        ids, own = texts[number : number + 1], places[number : number + 1]
        current = torch.arange(length).unsqueeze(0)
        logits = controller(F.embedding(ids.to(table.device), table), current.to(table.device))
        found.see("controller", logits.cpu(), _marks(own, current, length)[0])
        if context.stopping():
            raise Stopped
    return found.result()
