"""The job graph: what reading and expanding a workflow yields, and what a controller runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlab.db.states import Cause

DEFAULT_RETRIES: Mapping[Cause, int] = {
    Cause.NODE_LOST: 3,
    Cause.OUT_OF_MEMORY: 1,
    Cause.INFRASTRUCTURE: 2,
}
"""Attempts beyond the first, by cause; causes not named are never retried."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker of a job needs; a gang has `workers` of them.

    cpus counts cores (torch threads follow it), gpus whole devices, memory bytes. `exclusive`: the
    job has its node to itself (benchmarks).
    """

    cpus: int = 1
    gpus: int = 0
    memory: int | None = None
    workers: int = 1
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One job: a YAML job at one point of its matrix and one seed.

    Attributes:
        name: unique in its workflow, e.g. `block[block_length=2,seed=0]`.
        job: the key in the YAML. kind: `train`, `evaluate`, ...
        spec: everything `run` needs besides its parents: JSON, resolved, defaults filled in.
        axes: matrix keys and `seed`, own and inherited, that references join on.
        parents: role -> name of the parent cell, e.g. {"from": "base[seed=0]", "data": "data"}.
        needs: names of further cells that must be done first (explicit `needs:`).
        identity: hex digest of all that determines the result; `parts` is the digest of each part,
            so `plan` can say which one made a job stale.
    """

    name: str
    job: str
    kind: str
    spec: Mapping[str, Any]
    axes: Mapping[str, Any]
    parents: Mapping[str, str]
    needs: tuple[str, ...]
    identity: str
    parts: Mapping[str, str]
    resources: Resources = Resources()
    retries: Mapping[Cause, int] = field(default_factory=lambda: dict(DEFAULT_RETRIES))
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """A workflow ready to run: cells in an order in which parents come first."""

    name: str
    text: str
    cells: tuple[Cell, ...]
    report: Mapping[str, Any]
