"""The workflow that a try runs: one YAML that grows from stage to stage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlab.methods.registry import REGISTRY
from kvlab.platform.jobs.checkpoint import written as method_written
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.points import Point
from kvlab.platform.trying.subject import Subject

MODEL, QUALITY, RECALL, SPEED = "model", "quality", "recall", "speed"
"""Its jobs."""
MOST_AT_ONCE = 8
"""Prompts that are scored at once at most: two caches of each are held."""
DEPTHS, SAMPLES = (0.0, 0.5, 1.0), 10
"""Of the questions about a fact in the prompt."""
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_TAKEN = ("true", "false", "null")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run so far.

    Attributes:
        data: of the workflow. quality: points whose divergence is measured; recall: those that
            are asked questions; speed: those that are timed.
    """

    subject: Subject
    asked: Asked
    data: Mapping[str, Any]
    quality: Sequence[Point] = field(default=())
    recall: Sequence[Point] = field(default=())
    speed: Sequence[Point] = field(default=())

    def text(self, cpus: int) -> str:
        """The YAML; `cpus` is what each job that is not timed may have."""
        asked, subject = self.asked, self.subject
        data = {**self.data, "sequence_length": asked.length}
        lines = [
            "version: 1",
            f"name: {asked.name(subject)}",
            f"model: {{checkpoint: {_flow(str(subject.folder))}}}",
            f"data: {_flow(data)}",
            "jobs:",
            f"  {MODEL}: {{train: {{method: {_method(subject)}, tokens: 0}}}}",
            *_job(QUALITY, "evaluate", self.quality, self._evaluated(), self._resources(cpus)),
        ]
        if self.recall:
            lines += _job(RECALL, "evaluate", self.recall, self._asking(), self._resources(cpus))
        if self.speed:
            timed = {
                "of": MODEL,
                "prompt": asked.prompt,
                "generate": asked.generate,
                "batch": [asked.batch],
            }
            lines += _job(SPEED, "benchmark", self.speed, timed, self._resources(None))
        lines.append(f"report: {{baseline: {MODEL}, pareto: [kl, kv_bytes_per_token]}}")
        return "\n".join(lines) + "\n"

    def _evaluated(self) -> dict[str, Any]:
        asked = self.asked
        return {
            "of": MODEL,
            "metrics": ["divergence"],
            "tokens": asked.sequences * asked.length,
            "prompt": asked.prompt,
            "generate": asked.generate,
            "batch_size": min(asked.sequences, MOST_AT_ONCE),
        }

    def _asking(self) -> dict[str, Any]:
        return {
            "of": MODEL,
            "metrics": ["recall", "multi_turn"],
            "recall": {
                "lengths": [self.asked.prompt],
                "depths": list(DEPTHS),
                "pairs": self.asked.pairs,
                "samples": SAMPLES,
            },
            "batch_size": MOST_AT_ONCE,
        }

    def _resources(self, cpus: int | None) -> dict[str, Any]:
        found: dict[str, Any] = {} if cpus in (None, 1) else {"cpus": cpus}
        return {**found, "gpus": 1} if self.asked.device == "cuda" else found


def _method(subject: Subject) -> str:
    return method_written(subject.trained) if subject.trained else baseline()


def baseline() -> str:
    """What a YAML calls the use of a model in which nothing is left out."""
    return next(value.name for value in REGISTRY.values("eviction") if value.default)


def _job(
    name: str,
    kind: str,
    points: Iterable[Point],
    settings: Mapping[str, Any],
    resources: Mapping[str, Any],
) -> list[str]:
    """One job of the YAML, a line for every point."""
    lines = [f"  {name}:", "    seeds: [0]"]
    if resources:
        lines.append(f"    resources: {_flow(resources)}")
    lines += ["    matrix:", f"      {kind}.apply:"]
    lines += [f"        - {_flow(p.written) if p.written else baseline()}" for p in points]
    return [*lines, f"    {kind}: {_flow(settings)}"]


def _flow(value: Any) -> str:
    """A value on one line, as a person would write it: quotes only where they are needed."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value not in _TAKEN:
        return value
    return json.dumps(value, ensure_ascii=False)
