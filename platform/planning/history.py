"""How long jobs will take: from finished ones like them where there are any, else from FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from kvlab import KvlabError
from kvlab.db.history import Done
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.kind import Parent, Prediction

CORE_FLOPS = 20e9
"""Assumed FLOPs per second of one CPU core."""
GPU_FLOPS = 100e12
"""Assumed FLOPs per second of one GPU."""
STEP_SECONDS = 5e-3
"""Assumed of a pass that waits for the one before, on top of its FLOPs."""
NEWEST = 2_000
"""Finished jobs that are looked at."""
SAME_SIZE = 0.02
"""Jobs whose FLOPs differ by less than this share count as one size."""

NEAR = 8.0
"""Jobs whose FLOPs differ by less than this factor say something about each other's rate: a short
job's is mostly start-up."""

Basis = Literal["like jobs", "rate of its kind", "assumed rate"]


@dataclass(frozen=True, slots=True)
class Duration:
    """Predicted seconds, and what they rest on."""

    seconds: float
    basis: Basis


@dataclass(slots=True)
class History:
    """Finished jobs by kind, and by whether they went step by step: (FLOPs predicted for them,
    seconds they took)."""

    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, jobs: Iterable[Done]) -> History:
        """Read finished jobs; those whose ancestors are not among them are left out."""
        known = {(job.workflow_id, job.name): job for job in jobs}
        parents: dict[tuple[int, str], Parent | None] = {}
        history = cls()
        for job in known.values():
            parent = _parent(job, known, parents)
            if job.seconds is None or parent is None:
                continue
            try:
                prediction = KINDS[job.kind].predict(parent.spec, parent.parents)
            except (KvlabError, KeyError, ValueError):
                continue  # written by another version, or its checkpoint is gone
            seen = history.seen.setdefault(_class(job.kind, prediction), [])
            seen.append((prediction.flops or 0.0, job.seconds))
        return history

    def predict(self, kind: str, prediction: Prediction, resources: Resources) -> Duration | None:
        """Return how long a job will take; None where nothing is known."""
        if prediction.seconds is not None:
            return Duration(prediction.seconds, "assumed rate")
        seen = self.seen.get(_class(kind, prediction), [])
        flops = prediction.flops
        if flops is None:
            return Duration(median(s for _, s in seen), "like jobs") if seen else None
        alike = [s for f, s in seen if abs(f - flops) <= SAME_SIZE * flops]
        if alike:
            return Duration(median(alike), "like jobs")
        near = [(f, s) for f, s in seen if f and flops / NEAR <= f <= flops * NEAR]
        if near:
            rate = sum(f for f, _ in near) / max(sum(s for _, s in near), 1e-3)
            return Duration(flops / rate, "rate of its kind")
        waiting = prediction.steps * STEP_SECONDS
        return Duration(flops / assumed_rate(resources) + waiting, "assumed rate")


def _class(kind: str, prediction: Prediction) -> str:
    """What is comparable in its rate: waiting for a step costs more than its FLOPs."""
    return f"{kind} step by step" if prediction.steps else kind


def assumed_rate(resources: Resources) -> float:
    """FLOPs per second assumed of what a job asks for."""
    one = resources.gpus * GPU_FLOPS if resources.gpus else resources.cpus * CORE_FLOPS
    return math.prod((one, resources.workers))


def _parent(
    job: Done,
    known: Mapping[tuple[int, str], Done],
    made: dict[tuple[int, str], Parent | None],
) -> Parent | None:
    """Return a finished job with its ancestors, or None where one of them is not known."""
    key = (job.workflow_id, job.name)
    if key in made:
        return made[key]
    above: dict[str, Parent] = {}
    for role, name in job.parents.items():
        there = known.get((job.workflow_id, name))
        parent = _parent(there, known, made) if there is not None else None
        if parent is None or job.kind not in KINDS:
            made[key] = None
            return None
        above[role] = parent
    made[key] = Parent(job.name, job.kind, job.spec, above) if job.kind in KINDS else None
    return made[key]
