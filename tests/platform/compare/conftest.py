"""Workflows as the controller leaves them, written through the real store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlab.db.rows import NewJob, Workflow
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store

WINDOWS, TARGETS, BYTES_PER_TARGET = 40, 252, 3.5
CPU = {
    "device": "cpu",
    "device_name": "Test CPU",
    "threads": 2,
    "torch": "2.13.0",
    "dtype": "float32",
}
CONFIG = {"vocab_size": 2048, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 32}


class Lab:
    """Builds one workflow: jobs are added in order, parents first; `save` stores it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.jobs: list[NewJob] = []
        self.outcomes: dict[str, Any] = {}
        self.points: dict[str, list[tuple[str, int, float, int]]] = {}
        self.add("data", "data", "data", {}, {}, {}, {"vocab_size": 2048, "train_tokens": 4e5})

    def add(
        self,
        name: str,
        job: str,
        kind: str,
        spec: Mapping[str, Any],
        axes: Mapping[str, Any],
        parents: Mapping[str, str],
        outcome: Any,
    ) -> str:
        """Add a cell. Outcome: its result, (Cause, message) of a failure, or a JobState."""
        identity = f"{kind}:{name}"
        self.jobs.append(NewJob(name, job, kind, spec, axes, parents, (), identity, {}))
        self.outcomes[name] = outcome
        return name

    def train(
        self,
        job: str,
        seed: int,
        *,
        axes: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
        start: str | None = None,
        seconds: float = 60.0,
        outcome: Any = None,
        checkpoint: bool = False,
    ) -> str:
        """Add a training, or an uptraining from `start`."""
        axes = {**(axes or {}), "seed": seed}
        inside = ",".join(f"{key}={value}" for key, value in axes.items())
        spec: dict[str, Any] = {"method": method or {}, "tokens": 400_000, "seed": seed}
        parents = {"data": "data"}
        if start:
            parents = {"from": start, **parents}
        elif checkpoint:
            spec["model"] = {"checkpoint": "some/folder"}
        else:
            spec["model"] = {"config": CONFIG}
        result = {
            "loss": 3.1,
            "tokens": 400_000,
            "steps": 98,
            "seconds": seconds,
            "flops": seconds * 1e10,
            "tokens_per_second": 400_000 / seconds,
            "body_parameters": 806_144,
            "parameters": 1_068_288,
            "peak_memory_bytes": 300_000_000,
        }
        name = self.add(
            f"{job}[{inside}]",
            job,
            "uptrain" if start else "train",
            spec,
            axes,
            parents,
            result if outcome is None else outcome,
        )
        self.points[name] = [
            ("loss", step, 7.6 - step / 25, 1_000 + step) for step in range(0, 98, 10)
        ]
        return name

    def evaluate(
        self,
        of: str,
        loss: float,
        *,
        job: str = "quality",
        apply: Mapping[str, Any] | None = None,
        targets: str = "aa",
        length: int = 256,
        noise: float = 0.0,
        outcome: Any = None,
        by_position: bool = False,
    ) -> str:
        """Add an evaluation whose windows have a common shape plus `noise` of their own."""
        model = next(row for row in self.jobs if row.name == of)
        shape = np.random.default_rng(7).normal(0, 0.2, WINDOWS)
        own = np.random.default_rng(len(self.jobs)).normal(0, noise, WINDOWS) if noise else 0.0
        losses = shape - shape.mean() + loss + own
        mean = float(np.mean(losses))
        result = {
            "loss": mean,
            "perplexity": math.exp(mean),
            "bits_per_byte": mean / math.log(2) / BYTES_PER_TARGET,
            "perplexity_per_byte": math.exp(mean / BYTES_PER_TARGET),
            "targets": {"hash": targets, "count": WINDOWS * TARGETS, "first_target": 4},
            "window_losses": losses.tolist(),
            "window_targets": [TARGETS] * WINDOWS,
        }
        if by_position:
            result["loss_by_position"] = [None] * 4 + [
                mean + 2 / math.sqrt(1 + t) + 0.08 * math.cos(math.pi * t / 2)
                for t in range(length - 4)
            ]
        spec = {"apply": apply or {}, "sequence_length": length, "tokens": 10_000}
        return self.add(
            self._measuring(job, of, apply),
            job,
            "evaluate",
            spec,
            model.axes,
            {"of": of, "data": "data"},
            result if outcome is None else outcome,
        )

    def benchmark(
        self,
        of: str,
        speed: float,
        *,
        job: str = "speed",
        kv: float = 4096.0,
        prompt: int = 128,
        generate: int = 128,
        batches: Sequence[int] = (1, 8, 32),
        width: float = 0.03,
        apply: Mapping[str, Any] | None = None,
        gates: Mapping[str, bool] | None = None,
        environment: Mapping[str, Any] = CPU,
        outcome: Any = None,
        largest: int | None = None,
        replayed: float | None = 0.0,
        cuda_graph: bool = True,
    ) -> str:
        """Add a benchmark with `speed` tokens/s at batch 1; repeats spread by +-`width`."""
        model = next(row for row in self.jobs if row.name == of)

        def timed(value: float) -> dict[str, Any]:
            samples = [value * (1 + width * s) for s in (-1, -0.5, 0, 0.5, 1)]
            return {"median": value, "low": samples[0], "high": samples[-1], "samples": samples}

        rows = [
            {
                "batch": batch,
                "prompt": prompt,
                "generate": generate,
                "prefill_seconds": timed(0.02 * batch * 100 / speed),
                "time_to_first_token": timed(0.021 * batch * 100 / speed),
                "decode_tokens_per_second": timed(speed * batch**0.8 * 1.1),
                "tokens_per_second": timed(speed * batch**0.8),
                "replayed": replayed,
                "kv_bytes": int(kv * batch * 256),
                "kv_tokens": batch * 256,
                "kv_bytes_per_token": kv,
                "kv_bytes_per_token_predicted": kv * 0.998,
                "peak_memory_bytes": 200_000_000 + int(kv * batch * 256),
            }
            for batch in batches
        ]
        result = {
            "rows": rows,
            "largest_batch": largest,
            "environment": dict(environment),
            "gates": {"repeats_enough": True, "alone": True, **(gates or {})},
        }
        spec = {
            "prompt": prompt,
            "generate": generate,
            "batch": list(batches),
            "repeats": 5,
            "apply": apply or {},
            "kv_budget": None,
            "dtype": "auto",
            **({} if cuda_graph else {"cuda_graph": False}),
        }
        return self.add(
            self._measuring(job, of, apply),
            job,
            "benchmark",
            spec,
            model.axes,
            {"of": of},
            result if outcome is None else outcome,
        )

    def _measuring(self, job: str, of: str, apply: Mapping[str, Any] | None) -> str:
        return f"{job}[of={of}{f',apply={apply}' if apply else ''}]"

    def save(self, report: Mapping[str, Any] | None = None, name: str = "study") -> int:
        """Store everything and return the workflow's number."""
        report = report or {
            "baseline": "base",
            "pareto": ["perplexity", "tokens_per_second", "kv_bytes_per_token"],
        }
        with Store.open(f"sqlite:///{self.home / 'kvlab.db'}") as store:
            wid = store.create_workflow(
                name, f"version: 1\nname: {name}\n", dict(report), self.jobs, 1.0
            )
            ids = {row.name: row.id for row in store.load(wid).jobs}
            lease = store.claim(wid, "test", 3600.0, 1.0)
            with store.batch(lease, 2.0) as batch:
                for job in self.jobs:
                    self._finish(batch, job, ids[job.name])
            store.release(lease, WorkflowState.DONE, 3.0)
        return wid

    def _finish(self, batch: Any, job: NewJob, job_id: int) -> None:
        outcome = self.outcomes[job.name]
        if outcome is JobState.WAITING:
            return
        if outcome is JobState.SKIPPED:
            batch.move(job_id, JobState.SKIPPED)
            return
        if job.parents:
            batch.move(job_id, JobState.QUEUED)
        attempt = batch.start(job_id, "worker")
        if outcome is JobState.RUNNING:
            return
        batch.points(job_id, attempt, self.points.get(job.name, []))
        if isinstance(outcome, tuple):
            cause, message = outcome
            batch.end(job_id, attempt, cause, JobState.FAILED, message=message)
        else:
            batch.end(job_id, attempt, Cause.DONE, JobState.DONE, result=outcome)

    def load(self, wid: int) -> Workflow:
        """The stored workflow."""
        with Store.open(f"sqlite:///{self.home / 'kvlab.db'}", read_only=True) as store:
            return store.load(wid)

    def rename(self, old: str, new: str) -> None:
        """Give the newest cell another name."""
        self.jobs[-1] = replace(self.jobs[-1], name=new)
        self.outcomes[new] = self.outcomes.pop(old)


def block(length: int) -> dict[str, Any]:
    """The canonical method of a Block Transformer."""
    return {"granularity": {"block_transformer": {"block_length": length}}}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty workflow in a home of its own."""
    return Lab(tmp_path)


@pytest.fixture
def quickstart(lab: Lab) -> Lab:
    """Full attention against two block lengths over three seeds, as the shipped quickstart."""
    return fill(lab)


@pytest.fixture(scope="session")
def make_quickstart() -> Callable[[Path], Lab]:
    """The same in a folder of the caller's choice."""
    return lambda home: fill(Lab(home))


def fill(lab: Lab) -> Lab:
    """Add the quickstart's jobs."""
    for seed in (0, 1, 2):
        base = lab.train("base", seed)
        lab.evaluate(base, 3.50 + 0.01 * seed, noise=0.01, by_position=True)
        lab.benchmark(base, 100 + seed)
        for length, loss, speed in ((2, 3.56, 170), (4, 3.75, 260)):
            model = lab.train(
                "block",
                seed,
                axes={"block_length": length},
                method=block(length),
                start=base,
                seconds=15.0,
            )
            lab.evaluate(model, loss + 0.01 * seed, noise=0.01, by_position=True)
            lab.benchmark(model, speed + seed, kv=4096.0 / length)
    return lab
