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
from kvlab.methods.packing import Documents, Packer, Rows
from kvlab.platform.data import corpus
from kvlab.platform.jobs import memory
from kvlab.platform.jobs.context import Context, Diverged, JobError, Stopped
from kvlab.platform.jobs.flops import train_flops_per_token
from kvlab.platform.jobs.training import checkpoint
from kvlab.platform.jobs.training.gang import Gang
from kvlab.platform.jobs.training.objective import Objective
from kvlab.platform.jobs.training.optimizer import adamw, learning_rate

UNASKED = 60.0
"""Seconds between checkpoints where the spec names no number of steps."""
GO_ON, CHECKPOINT, STOP = 0, 1, 2
AGREE = 4
"""Steps between two times at which the ranks of a gang agree whether to go on: it makes them wait
for one another, and the host for the device."""
STAGES = 1_000_033
"""Between the seeds of two stages: uptraining reads its text in another order than its parent."""


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
        seed=(spec["seed"] or 0) + STAGES * spec.get("stage", 0),
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
        self.model, self.teacher = objective.model, objective.teacher
        self.model.checkpoint_gradients(spec.get("gradient_checkpointing", False))
        dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad}
        assert dtypes == {torch.float32}, f"weights are trained in float32, found {dtypes}"
        self.per_step = spec["batch_size"] * spec["accumulate"] * spec["sequence_length"]
        self.steps = math.ceil(spec["tokens"] / self.per_step)
        self.module: nn.Module = gang.wrap(objective, spec["parallel"])
        self.optimizer = adamw(self.module, spec)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.tail = max(1, math.ceil(self.steps * 0.05))
        self.losses: deque[float] = deque(maxlen=max(self.tail, spec["log_every"]))
        self.pending: list[Tensor] = []
        self.step, self.seconds, self.targets = 0, 0.0, 0
        self._begun = 0.0
        lead = cost_of(self.model.config, self.model.method).first_target()
        self._may_score = torch.arange(spec["sequence_length"]) >= lead

    def run(self) -> dict[str, Any]:
        """Train to the last step and return the part of the result that training decides.

        Raises:
            Diverged: the loss or the gradient is not finite.
            Stopped: the context asked for it; a checkpoint was written.
        """
        self._restore()
        peak = memory.Peak(self.gang.device)
        saved = time.perf_counter()
        self._begun = saved - self.seconds
        logged = self.seconds, self.step
        while self.step < self.steps:
            self._advance()
            if self.step % self.spec["log_every"] == 0 or self.step == self.steps:
                norm = self._settle()
                self._log(norm, (self.seconds - logged[0]) / (self.step - logged[1]))
                logged = self.seconds, self.step
            todo = self._todo(time.perf_counter() - saved)
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
        for micro, batch in enumerate(self._draw()):
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
        predicted = targets_sum.clamp(min=1)
        scale = (nominal * self.gang.workers / predicted).float()
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.spec["clip"])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.stack((nll_sum / predicted, norm.double(), targets_sum)))
        self.step += 1

    def _draw(self) -> list[Rows]:
        """Take the micro-batches of a step; those that hold nothing to learn from are passed over.

        A long prompt of a chat can fill a whole step, and a step without a gradient would only let
        the weights decay. Every rank reads all rows, so all pass over the same.

        Raises:
            JobError: the whole text holds nothing to learn from.
        """
        first = self.rows.cursor()["epoch"]
        while True:
            size, times = self.spec["batch_size"], self.spec["accumulate"]
            batches = [self.rows.take(size) for _ in range(times)]
            if any(bool((batch.counts & self._may_score).any()) for batch in batches):
                return batches
            if self.rows.cursor()["epoch"] > first + 1:
                raise JobError(
                    "no token that counts stands where the model predicts: raise sequence_length "
                    f"({self.spec['sequence_length']}) or look at the data's roles"
                )

    def _precision(self) -> torch.autocast:
        asked, device = self.spec["precision"], self.gang.device.type
        half = asked == "bfloat16" or (asked == "auto" and device == "cuda")
        return torch.autocast(device, dtype=torch.bfloat16, enabled=half)

    def _settle(self) -> float:
        """Read the pending losses, for which the device must be done; return the newest norm."""
        norm = math.nan
        first = self.step - len(self.pending)
        for index, (loss, norm, targets) in enumerate(torch.stack(self.pending).tolist()):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise Diverged(
                    f"step {first + index + 1} of {self.steps}: loss {loss:g}, gradient norm "
                    f"{norm:g}: lower learning_rate ({self.spec['learning_rate']:g}), or warm up "
                    "for longer"
                )
            self.losses.append(loss)
            self.targets += int(targets)
        self.pending.clear()
        self.seconds = time.perf_counter() - self._begun
        return norm

    def _log(self, norm: float, seconds_per_step: float) -> None:
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
        """Decide with all ranks, which ask at the same steps."""
        every = self.spec["checkpoint_every"]
        due = bool(every) and self.step % every == 0
        alone = self.gang.workers == 1
        if self.step == self.steps or not (alone or due or self.step % AGREE == 0):
            return GO_ON
        if self.context.stopping():
            return self.gang.highest(STOP)
        due = due or (not every and since_saved >= UNASKED)
        return self.gang.highest(CHECKPOINT if due else GO_ON)

    def _save(self) -> None:
        if self.pending:
            self._settle()  # never keep a state that has already diverged
        tensors = checkpoint.collect(self.module, self.optimizer)
        progress = {
            "step": self.step,
            "cursor": self.rows.cursor(),
            "losses": list(self.losses),
            "seconds": self.seconds,
            "targets": self.targets,
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
        self.targets = progress["targets"]
        self.losses.extend(progress["losses"])
        self.rows.seek(progress["cursor"])

    def _result(self, peak: int) -> dict[str, Any]:
        tokens = self.steps * self.per_step
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher.config, self.teacher.method.to_dict()
        method = self.model.method.to_dict()
        each = train_flops_per_token(self.model.config, {**self.spec, "method": method}, teacher)
        last = list(self.losses)[-self.tail :]
        return {
            "loss": math.fsum(last) / len(last) if last else None,
            "tokens": tokens,
            "targets": self.targets,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
            "flops": each * tokens,
            "peak_memory_bytes": peak,
        }
