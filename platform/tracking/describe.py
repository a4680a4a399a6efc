"""A job as MLflow shows it: few parameters and metrics, named alike for every kind of job."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from kvlab.db.states import JobState, WorkflowState
from kvlab.platform.compare.labels import FULL, Canonical
from kvlab.platform.compare.metrics import AT_BUDGET, RATES
from kvlab.platform.tracking.messages import JobMessage, WorkflowMessage

STATUS: Mapping[JobState, str] = {
    JobState.WAITING: "SCHEDULED",
    JobState.QUEUED: "SCHEDULED",
    JobState.RUNNING: "RUNNING",
    JobState.DONE: "FINISHED",
    JobState.FAILED: "FAILED",
    JobState.SKIPPED: "KILLED",
    JobState.CANCELLED: "KILLED",
}
WORKFLOW_STATUS: Mapping[WorkflowState, str] = {
    WorkflowState.RUNNING: "RUNNING",
    WorkflowState.DONE: "FINISHED",
    WorkflowState.FAILED: "FAILED",
    WorkflowState.STOPPED: "KILLED",
    WorkflowState.CANCELLED: "KILLED",
}
ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})

LONGEST_KEY = 250
LONGEST_VALUE = 500
MOST_METRICS = 20
"""Metrics of a result whose kind is not known here; MLflow's views slow down beyond a few."""

_SIZES = ("width", "layers", "heads", "kv_heads", "vocab_size")
_SETTINGS = (
    "tokens", "sequence_length", "batch_size", "learning_rate", "precision", "prompt", "generate",
    "dtype", "kv_budget",
)  # fmt: skip
_RATES = ("tokens_per_second", "decode_tokens_per_second", "time_to_first_token")
_SAME = ("tokens", "seconds", "flops", "body_parameters", "parameters", "peak_memory_bytes")
_QUALITY = ("perplexity", "perplexity_per_byte", "bits_per_byte")
_SCALARS: Mapping[str, Mapping[str, str]] = {
    # A training logs `loss` and `tokens_per_second` as it goes: its end has names of its own.
    "train": {
        **{name: name for name in _SAME},
        "loss": "final_loss",
        "tokens_per_second": "mean_tokens_per_second",
    },
    "evaluate": {**{name: name for name in _QUALITY}, "loss": "final_loss"},
    "data": {name: name for name in ("vocab_size", "train_tokens", "heldout_tokens")},
}
"""Kind -> what of its result is shown, and as what."""


def workflow_tags(workflow: WorkflowMessage) -> dict[str, str]:
    """Tags of a workflow's run. The first two find it again."""
    tags = {
        "kvlab.workflow_id": str(workflow["id"]),
        "kvlab.created_ms": str(milliseconds(workflow["created_at"])),
        "kvlab.kind": "workflow",
    }
    if text := workflow.get("text"):
        tags["mlflow.note.content"] = f"```yaml\n{text[:7000]}\n```"
    return tags


def job_tags(workflow: WorkflowMessage, job: JobMessage) -> dict[str, str]:
    """Tags of a job's run; `kvlab.job_id` finds it again under its workflow's run."""
    tags = {
        "kvlab.workflow_id": str(workflow["id"]),
        "kvlab.job_id": str(job["id"]),
        "kvlab.identity": job["identity"],
        "kvlab.job": job["job"],
        "kvlab.kind": job["kind"],
    }
    if (reused := job.get("reused_from")) is not None:
        tags["reused_from"] = str(reused)
    gates = (job.get("result") or {}).get("gates")
    if closed := [name for name, value in (gates or {}).items() if value is False]:
        tags["kvlab.void"] = ", ".join(closed)
    for name in ("cause", "message"):
        if value := job.get(name):
            tags[f"kvlab.{name}"] = str(value)[:LONGEST_VALUE]
    return tags


def params(job: JobMessage) -> dict[str, str]:
    """Parameters to group and filter by: method, how it is applied, axes, sizes, settings."""
    spec = job["spec"]
    model = job.get("model") or spec
    found: dict[str, Any] = {**job["axes"]}
    if "method" in model:
        found.update(_choices(model["method"]), method=_names(model["method"]) or FULL)
    if "apply" in spec:
        found.update(_choices(spec["apply"]), apply=_names(spec["apply"]) or "none")
    found["kind"] = job["kind"]
    config = (model.get("model") or {}).get("config") or {}
    found.update({name: config[name] for name in _SIZES if name in config})
    found.update({name: spec[name] for name in _SETTINGS if spec.get(name) is not None})
    if "batch" in spec:
        found["batch"] = ",".join(map(str, spec["batch"]))
    return {key_text(name): value_text(value) for name, value in found.items()}


def metrics(job: JobMessage) -> Iterator[tuple[str, float, int]]:
    """Yield (key, value, step) of a finished job's result."""
    result = job.get("result") or {}
    kind = "train" if "flops" in result else job["kind"]
    if kind == "benchmark":
        yield from _benchmark(job["spec"], result)
        return
    names = _SCALARS.get(kind) or {
        name: name for name in [key for key in result if _number(result[key])][:MOST_METRICS]
    }
    for name, shown in names.items():
        if _number(value := result.get(name)):
            yield key_text(shown), float(value), 0
    curve = result.get("loss_by_position") or ()
    stride = max(1, math.ceil(len(curve) / 500))
    for position in range(0, len(curve), stride):
        if _number(curve[position]):
            yield "loss_by_position", float(curve[position]), position


def _benchmark(
    spec: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[tuple[str, float, int]]:
    """The numbers at the largest batch asked for under their plain names, rates also by batch."""
    rows = sorted(result.get("rows") or (), key=lambda row: row["batch"])
    asked = [row for row in rows if row["batch"] in spec.get("batch", ())] or rows
    for row in rows:
        for name in _RATES:
            if _number(value := _median(row.get(name))):
                yield f"{name}_by_batch", float(value), int(row["batch"])
                if row is asked[-1]:
                    yield name, float(value), 0
                if name in RATES and row["batch"] == result.get("largest_batch"):
                    yield name + AT_BUDGET, float(value), 0
    for name in ("kv_bytes_per_token", "kv_bytes_per_token_predicted", "peak_memory_bytes"):
        if asked and _number(value := asked[-1].get(name)):
            yield name, float(value), 0
    if _number(largest := result.get("largest_batch")):
        yield "largest_batch", float(largest), 0


def _median(raw: Any) -> Any:
    return raw.get("median") if isinstance(raw, Mapping) else raw


def key_text(name: str) -> str:
    """A name that MLflow takes for a parameter or metric."""
    text = re.sub(r"[^\w\-. /:]", "_", name)[:LONGEST_KEY] or "_"
    normal = posixpath.normpath(text)
    if normal != text or normal == "." or normal.startswith(("..", "/")):
        text = text.replace("/", "_").replace(".", "_")
    return text


def value_text(value: Any) -> str:
    """A parameter's value: text as it is, anything else as JSON, cut to a readable length."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:LONGEST_VALUE]


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _names(canonical: Canonical) -> str:
    return "+".join(name for choices in canonical.values() for name in choices)


def _choices(canonical: Canonical) -> dict[str, Any]:
    """Every parameter of a method that is set, under its own name."""
    return {
        key: value
        for choices in canonical.values()
        for parameters in choices.values()
        for key, value in parameters.items()
        if value is not None
    }


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
