"""The training loop: rows in, steps of the optimizer, points out, and an exact way back in."""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvlab.methods.cost import cost_of
from kvlab.methods.model import LanguageModel
from kvlab.methods.packing import Documents, Packer
from kvlab.platform.data import corpus
from kvlab.platform.jobs import memory
from kvlab.platform.jobs.context import Context, Diverged, JobError, Stopped
from kvlab.platform.jobs.training import checkpoint
from kvlab.platform.jobs.training.gang import Gang
from kvlab.platform.jobs.training.objective import Objective
from kvlab.platform.jobs.training.optimizer import adamw, learning_rate

UNASKED = 60.0
"""Seconds between checkpoints where the spec names no number of steps."""
GO_ON, CHECKPOINT, STOP = 0, 1, 2


def rows_of(model: LanguageModel, spec: Mapping[str, Any], context: Context) -> Packer:
    """Return the stream of rows that the model trains on.

    Raises:
        JobError: the data's vocabulary is larger than the model's.
    """
    data = corpus.load(context.inputs["data"], "train")
    if data.vocab_size > model.config.vocab_size:
        raise JobError(
            f"the data's tokenizer has {data.vocab_size} tokens, the model's vocabulary "
            f"{model.config.vocab_size}: use the model's own tokenizer"
        )
    return model.packer(
        model.method,
        Documents(data.tokens, data.ends, data.counts),
        spec["sequence_length"],
        eos=data.end_of_text,
        seed=spec["seed"] or 0,
    )


class Training:
    """One training run of one rank, from its newest checkpoint or from the start.

    Args:
        objective: the model and its loss, on the device.
        rows: the stream of training rows; every rank reads all of it and takes its share.
        spec: of a train or uptrain job. gang: the ranks that train together.
    """

    def __init__(
        self,
        objective: Objective,
        rows: Packer,
        spec: Mapping[str, Any],
        context: Context,
        gang: Gang,
    ) -> None:
        if spec["batch_size"] % gang.workers:
            raise JobError(
                f"batch_size {spec['batch_size']} cannot be shared by {gang.workers} workers: "
                f"choose a multiple of {gang.workers}"
            )
        self.rows, self.spec, self.context, self.gang = rows, spec, context, gang
        self.model = objective.model
        self.per_step = spec["batch_size"] * spec["accumulate"] * spec["sequence_length"]
        self.steps = math.ceil(spec["tokens"] / self.per_step)
        self.module: nn.Module = gang.wrap(objective, spec["parallel"])
        self.optimizer = adamw(self.module, spec)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.tail = max(1, math.ceil(self.steps * 0.05))
        self.losses: deque[float] = deque(maxlen=max(self.tail, spec["log_every"]))
        self.pending: list[Tensor] = []
        self.step, self.seconds = 0, 0.0

    def run(self) -> dict[str, Any]:
        """Train to the last step and return the part of the result that training decides.

        Raises:
            Diverged: the loss or the gradient is not finite.
            Stopped: the context asked for it; a checkpoint was written.
        """
        self._restore()
        peak = memory.Peak(self.gang.device)
        begun = saved = time.perf_counter()
        before, logged = self.seconds, (time.perf_counter(), self.step)
        while self.step < self.steps:
            self._advance()
            now = time.perf_counter()
            self.seconds = before + now - begun
            if self.step % self.spec["log_every"] == 0 or self.step == self.steps:
                self._log((now - logged[0]) / (self.step - logged[1]))
                logged = (now, self.step)
            todo = self.gang.highest(self._todo(now - saved))
            if todo != GO_ON:
                self._save()
                saved = time.perf_counter()
            if todo == STOP:
                raise Stopped
        return self._result(peak.bytes())

    def _advance(self) -> None:
        """Take one step of the optimizer on one global batch."""
        rate = learning_rate(self.step, self.steps, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nominal = self.per_step / self.gang.workers
        sums = torch.zeros(2, dtype=torch.float64, device=self.gang.device)
        for micro in range(self.spec["accumulate"]):
            batch = self.rows.take(self.spec["batch_size"])
            ids, counts = self.gang.share(batch.ids), self.gang.share(batch.counts)
            valid = None if bool(batch.valid.all()) else self.gang.share(batch.valid)
            last = micro == self.spec["accumulate"] - 1
            with self.gang.accumulating(self.module, last):
                with self._precision():
                    objective, nll, targets = self.module(ids, valid, counts)
                (objective / nominal).backward()
            sums += torch.stack((nll.double(), targets.double()))
        nll_sum, targets_sum = self.gang.total(sums)
        # Ranks and micro-batches hold unequal numbers of targets: only now is the mean known.
        scale = (nominal * self.gang.workers / targets_sum.clamp(min=1)).float()
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.spec["clip"])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.stack((nll_sum / targets_sum, norm.double())))
        self.step += 1

    def _precision(self) -> torch.autocast:
        asked, device = self.spec["precision"], self.gang.device.type
        half = asked == "bfloat16" or (asked == "auto" and device == "cuda")
        return torch.autocast(device, dtype=torch.bfloat16, enabled=half)

    def _settle(self) -> float:
        """Read the pending losses from the device; return the newest gradient norm."""
        norm = math.nan
        first = self.step - len(self.pending)
        for index, (loss, norm) in enumerate(torch.stack(self.pending).tolist()):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise Diverged(
                    f"step {first + index + 1} of {self.steps}: loss {loss:g}, gradient norm "
                    f"{norm:g}: lower learning_rate ({self.spec['learning_rate']:g}), or warm up "
                    "for longer"
                )
            self.losses.append(loss)
        self.pending.clear()
        return norm

    def _log(self, seconds_per_step: float) -> None:
        norm = self._settle()
        every = self.spec["log_every"]
        since = self.step % every or every
        loss = math.fsum(list(self.losses)[-since:]) / min(since, len(self.losses))
        if self.gang.rank:
            return
        points = {
            "loss": loss,
            "learning_rate": learning_rate(self.step - 1, self.steps, self.spec),
            "tokens_per_second": self.per_step / seconds_per_step,
            "gradient_norm": norm,
        }
        self.context.log(points, self.step)
        done, total = self.step * self.per_step, self.steps * self.per_step
        self.context.progress(done, total, f"loss {loss:.3f}")

    def _todo(self, since_saved: float) -> int:
        if self.step == self.steps:
            return GO_ON
        if self.context.stopping():
            return STOP
        every = self.spec["checkpoint_every"]
        due = self.step % every == 0 if every else since_saved >= UNASKED
        return CHECKPOINT if due and self.gang.rank == 0 else GO_ON

    def _save(self) -> None:
        if self.pending:
            self._settle()  # never keep a state that has already diverged
        tensors = checkpoint.collect(self.module, self.optimizer)
        progress = {
            "step": self.step,
            "cursor": self.rows.cursor(),
            "losses": list(self.losses),
            "seconds": self.seconds,
        }
        if self.gang.rank == 0:
            self.context.checkpoint(
                self.step, lambda folder: checkpoint.write(folder, tensors, progress)
            )

    def _restore(self) -> None:
        found = self.context.restore()
        step = found[0] if found else 0
        if self.gang.highest(step) != -self.gang.highest(-step):
            # ESTALE is an infrastructure failure: the attempt ends and another may fare better.
            raise OSError(errno.ESTALE, f"ranks see different checkpoints, this one {step}")
        if found is None:
            return
        progress = checkpoint.restore(found[1], self.module, self.optimizer)
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.losses.extend(progress["losses"])
        self.rows.seek(progress["cursor"])

    def _result(self, peak: int) -> dict[str, Any]:
        tokens = self.steps * self.per_step
        cost = cost_of(self.model.config, self.model.method)
        last = list(self.losses)[-self.tail :]
        return {
            "loss": math.fsum(last) / len(last) if last else None,
            "tokens": tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
            "flops": cost.train_flops_per_token(self.spec["sequence_length"]) * tokens,
            "peak_memory_bytes": peak,
        }
