"""Finds the arms of a workflow: each model, at each point of its matrix, in each way it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvlab.db.rows import JobRow
from kvlab.db.states import TERMINAL, JobState
from kvlab.platform.compare.given import given_text
from kvlab.platform.compare.labels import (
    FULL,
    Parameter,
    arm_name,
    canonical,
    method_text,
    varying_parameters,
    with_its_budget,
)
from kvlab.platform.compare.metrics import QUALITIES
from kvlab.platform.compare.samples import READERS, Key, Reading, Recalled, Sample
from kvlab.platform.compare.studies import of_trial

OF = "of"
"""The role in which a measuring job names the model it measures."""
PREPARING = frozenset({"calibrate", "label", "controller"})
"""Kinds that name a model and say nothing of how good it is: other jobs go on from theirs."""


@dataclass(slots=True)
class Draft:
    """An arm while its rows are being read: seed -> model row, and every sample found."""

    id: str
    job: str
    axes: dict[str, Any]
    method: str
    apply: str
    models: dict[str, JobRow] = field(default_factory=dict)
    measurements: list[JobRow] = field(default_factory=list)
    readings: list[tuple[JobRow, Reading]] = field(default_factory=list)
    samples: dict[Key, dict[str, Sample]] = field(default_factory=dict)
    curves: dict[tuple[Any, ...], list[tuple[float | None, ...]]] = field(default_factory=dict)
    cells: dict[tuple[Any, ...], list[tuple[Recalled, ...]]] = field(default_factory=dict)
    costs: list[tuple[float, float, float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    from_checkpoint: bool = False

    def makers(self, jobs: frozenset[str] | None) -> list[JobRow]:
        """The rows that were to give a number: measurements by these YAML jobs, or the models."""
        if jobs is None:
            return list(self.models.values())
        return [row for row in self.measurements if row.job in jobs]


def missing(rows: Sequence[JobRow]) -> str:
    """Say in a word why rows gave no number."""
    states = [row.state for row in rows if row.state is not JobState.DONE]
    for state in (JobState.FAILED, JobState.SKIPPED, JobState.CANCELLED, JobState.RUNNING):
        if state in states:
            return state.value
    return "waiting" if states else "not measured"


def seed_of(row: JobRow) -> str:
    """The seed of a row as a key; rows without seeds are one seed."""
    return str(row.axes.get("seed", 0))


def gather(jobs: Sequence[JobRow]) -> list[Draft]:
    """Return the arms in the order in which the workflow names their models.

    The jobs of a study's trials are none: they are shown with their study.
    """
    by_name = {row.name: row for row in jobs}
    drafts: dict[tuple[str, str, str], Draft] = {}
    measured = [
        (row, by_name[row.parents[OF]])
        for row in jobs
        if OF in row.parents and row.kind not in PREPARING and not of_trial(row)
    ]
    names = _names([row for row in jobs if not of_trial(row)], measured)

    for row, model in measured:
        given = given_text(row, by_name)
        draft = _draft(drafts, names, model, row.spec.get("apply") or {}, given)
        draft.models.setdefault(seed_of(model), model)
        draft.measurements.append(row)
        reader = READERS.get(row.kind)
        if row.state is JobState.DONE and row.result is not None and reader is not None:
            for reading in reader(row.spec, row.result):
                _take(draft, row, reading)
    used = {name for row in jobs for name in row.parents.values()}
    for row in jobs:
        if _makes_model(row) and row.name not in used and not of_trial(row):
            draft = _draft(drafts, names, row, {})
            draft.models.setdefault(seed_of(row), row)
    order = {row.name: index for index, row in enumerate(jobs)}
    for draft in drafts.values():
        _train(draft, by_name)
        _void_unscored(draft)
        draft.problems.extend(_problems(draft, by_name))
    return sorted(
        drafts.values(), key=lambda d: (min(order[row.name] for row in d.models.values()), d.apply)
    )


def _draft(
    drafts: dict[tuple[str, str, str], Draft],
    names: tuple[set[Parameter], set[Parameter]],
    model: JobRow,
    applied: Mapping[str, Any],
    given: str = "",
) -> Draft:
    trained_names, applied_names = names
    axes = {key: value for key, value in model.axes.items() if key != "seed"}
    key = (model.job, canonical(axes), canonical(applied) + given)
    if key not in drafts:
        used = method_text(with_its_budget(applied), applied_names)
        apply = " with ".join(filter(None, (used, given)))
        name = arm_name(model.job, axes, apply)
        # Only axes that JSON tells apart and text does not, as 1 and "1", can meet here.
        same = sum(
            draft.id == name or draft.id.startswith(f"{name} #") for draft in drafts.values()
        )
        method = method_text(model.spec.get("method") or {}, trained_names) or FULL
        drafts[key] = Draft(f"{name} #{same + 1}" if same else name, model.job, axes, method, apply)
    return drafts[key]


def _names(
    jobs: Sequence[JobRow], measured: Sequence[tuple[JobRow, JobRow]]
) -> tuple[set[Parameter], set[Parameter]]:
    """Parameters worth naming: those that differ between models, and between uses of them."""
    trained = [row.spec["method"] for row in jobs if row.spec.get("method")]
    applied = [with_its_budget(row.spec["apply"]) for row, _ in measured if row.spec.get("apply")]
    return varying_parameters(trained), varying_parameters(applied)


def _take(draft: Draft, row: JobRow, reading: Reading) -> None:
    draft.readings.append((row, reading))
    for key, sample in reading.samples.items():
        # A second job that measures the same thing of the same seed adds no evidence: first wins.
        draft.samples.setdefault(key, {}).setdefault(seed_of(row), sample)
    if reading.by_position:
        draft.curves.setdefault(reading.setting, []).append(reading.by_position)
    if reading.cells:
        draft.cells.setdefault(reading.setting, []).append(reading.cells)


def _void_unscored(draft: Draft) -> None:
    """Void what was measured in a dtype in which the arm was not scored: its quality is another."""
    scored = {_dtype(row) for row, reading in draft.readings if reading.place in QUALITIES}
    scored -= {None}
    for row, reading in draft.readings:
        own = _dtype(row)
        if (
            reading.place not in ("speed", "serving", "load")
            or own is None
            or not scored
            or own in scored
        ):
            continue
        reason = f"it was timed in {own} but scored in {' and '.join(sorted(map(str, scored)))}"
        for key in reading.samples:
            samples = draft.samples[key]
            sample = samples[seed_of(row)]
            samples[seed_of(row)] = replace(sample, void=sample.void or reason)


def _dtype(row: JobRow) -> str | None:
    """The dtype that a measuring job used, where its result says so."""
    return ((row.result or {}).get("environment") or {}).get("dtype")


def _train(draft: Draft, by_name: Mapping[str, JobRow]) -> None:
    for seed, model in draft.models.items():
        ancestors = list(_ancestors(model, by_name))
        draft.from_checkpoint |= any(
            "checkpoint" in (row.spec.get("model") or {}) for row in (model, *ancestors)
        )
        if model.result is None:
            continue
        own = _spent(model)
        before = [_spent(row) for row in ancestors]
        inherited = (sum(s for s, _ in before), sum(f for _, f in before))
        draft.costs.append((*own, *inherited))
        found = {
            "body_parameters": model.result.get("body_parameters"),
            "parameters": model.result.get("parameters"),
            "train_seconds": own[0] + inherited[0] or None,
            "train_flops": own[1] + inherited[1] or None,
        }
        for metric, value in found.items():
            if value is not None:
                samples = draft.samples.setdefault(Key(metric, None, None), {})
                samples[seed] = Sample(float(value))


def _ancestors(row: JobRow, by_name: Mapping[str, JobRow]) -> Iterator[JobRow]:
    """Every job that this one's artifacts were made from, each once."""
    seen: set[str] = set()
    stack = list(row.parents.values())
    while stack:
        name = stack.pop()
        if name not in seen and name in by_name:
            seen.add(name)
            yield by_name[name]
            stack.extend(by_name[name].parents.values())


def _spent(row: JobRow) -> tuple[float, float]:
    result = row.result or {}
    if "flops" not in result:
        return 0.0, 0.0
    return float(result.get("seconds") or 0.0), float(result["flops"] or 0.0)


def _problems(draft: Draft, by_name: Mapping[str, JobRow]) -> Iterator[str]:
    for row in (*draft.models.values(), *draft.measurements):
        if row.state is JobState.DONE or row.state not in TERMINAL:
            continue
        if row.state is JobState.SKIPPED:
            blamed = next(
                (a.name for a in _ancestors(row, by_name) if a.state is JobState.FAILED), None
            )
            yield f"{row.name} was skipped" + (f" because {blamed} failed" if blamed else "")
        elif row.state is JobState.CANCELLED:
            yield f"{row.name} was cancelled"
        else:
            cause = f" ({row.cause.value})" if row.cause else ""
            first_line = (row.message or "").strip().split("\n")[0]
            yield f"{row.name} failed{cause}" + (f": {first_line}" if first_line else "")


def _makes_model(row: JobRow) -> bool:
    return "method" in row.spec and OF not in row.parents
