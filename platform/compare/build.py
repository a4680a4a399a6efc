"""From a stored workflow to its comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvlab.db.rows import JobRow, Workflow
from kvlab.db.states import TERMINAL, JobState
from kvlab.platform.compare.arms import Draft, gather, missing, seed_of
from kvlab.platform.compare.calibrations import read_calibrations
from kvlab.platform.compare.cells import mean_cells
from kvlab.platform.compare.columns import Layout, lay_out
from kvlab.platform.compare.controllers import read_guesses
from kvlab.platform.compare.differences import Samples, change, contrast, mean_contrast, verdict
from kvlab.platform.compare.labels import grouped, listed
from kvlab.platform.compare.metrics import METRICS, Place
from kvlab.platform.compare.model import Arm, Column, Comparison, Cost, Front, Number
from kvlab.platform.compare.pareto import front
from kvlab.platform.compare.replays import replay_notes
from kvlab.platform.compare.statistics import summarise
from kvlab.platform.compare.studies import read_studies, study_notes, unfound

ROUNDING = 1e-12
"""Log ratios and differences up to this are those of equal numbers."""


def compare(workflow: Workflow) -> Comparison:
    """Build the comparison of a workflow as it stands, finished or not.

    Every model and every use of it that the workflow names becomes an arm, whatever became of its
    jobs; a workflow without models has no arms.
    """
    drafts = gather(workflow.jobs)
    layout = lay_out(drafts)
    studies = read_studies(workflow.jobs)
    baseline, notes = _baseline(drafts, workflow.report.get("baseline"))
    if studies and not drafts:
        notes = []  # the baseline is measured for a study
    against = {draft.id: _against(draft, drafts, baseline) for draft in drafts}
    by_id = {draft.id: draft for draft in drafts}
    arms = tuple(
        _arm(draft, by_id.get(against[draft.id] or ""), draft in baseline, layout)
        for draft in drafts
    )
    measured = _measured(drafts, arms, layout)
    return Comparison(
        workflow_id=workflow.row.id,
        name=workflow.row.name,
        state=workflow.row.state.value,
        created_at=workflow.row.created_at,
        text=workflow.text,
        baseline=workflow.report.get("baseline"),
        arms=arms,
        settings=layout.settings,
        columns=layout.columns,
        front=_front(workflow.report.get("pareto") or (), arms, by_id, layout),
        notes=(
            *notes,
            *layout.notes,
            *_unfronted(workflow.report, layout),
            *_notes(arms, measured),
            *replay_notes(drafts),
            *study_notes(workflow.jobs),
            *_open(workflow.jobs),
        ),
        environments=_environments(workflow.jobs),
        jobs=_states(workflow.jobs),
        measured=measured,
        calibrations=read_calibrations(workflow.jobs),
        guesses=read_guesses(workflow.jobs),
        studies=studies,
        unfound=unfound(workflow.jobs),
    )


def _arm(draft: Draft, other: Draft | None, is_baseline: bool, layout: Layout) -> Arm:
    numbers = {column.id: _number(column, draft, other, layout) for column in layout.columns}
    return Arm(
        id=draft.id,
        job=draft.job,
        axes=draft.axes,
        method=draft.method,
        apply=draft.apply,
        baseline=is_baseline,
        against=other.id if other else None,
        states=_states([*draft.models.values(), *draft.measurements]),
        problems=tuple(draft.problems),
        numbers=numbers,
        cost=_cost(draft),
        loss_by_position=_curves(draft, layout, "quality"),
        models=tuple(row.reused_from or row.id for row in draft.models.values()),
        kl_by_position=_curves(draft, layout, "divergence"),
        cells={
            setting.id: mean_cells(found)
            for setting in layout.settings
            if (found := draft.cells.get(layout.keys[setting.id]))
        },
    )


def _number(column: Column, draft: Draft, other: Draft | None, layout: Layout) -> Number:
    samples = draft.samples.get(layout.key(column), {})
    makers = draft.makers(layout.jobs[column.setting] if column.setting else None)
    expected = len({seed_of(row) for row in makers})
    if not samples:
        return Number(None, expected=expected, missing=missing(makers))
    standing = {seed: sample for seed, sample in samples.items() if sample.void is None}
    reasons = sorted({sample.void for sample in samples.values() if sample.void})
    shown = standing or samples
    summary = summarise([sample.value for sample in shown.values()])
    low, high = summary.low, summary.high
    if summary.n == 1:
        only = next(iter(shown.values()))
        low, high = only.low, only.high
    theirs = other.samples.get(layout.key(column), {}) if other else {}
    metric = METRICS[column.metric]
    return Number(
        value=summary.mean,
        seeds={seed: sample.value for seed, sample in shown.items()},
        expected=expected,
        sd=summary.sd,
        low=low,
        high=high,
        void="; ".join(reasons) if not standing else None,
        missing=_left_out(len(samples) - len(standing), reasons) if standing else None,
        change=change(metric, samples, theirs) if theirs else None,
        unpaired=None if metric.exact else _unpaired(standing, theirs),
    )


def _left_out(count: int, reasons: list[str]) -> str | None:
    if not count:
        return None
    return f"{count} {'seed' if count == 1 else 'seeds'} left out ({'; '.join(reasons)})"


def _unpaired(ours: Samples, theirs: Samples) -> str | None:
    """Which seeds two means are over, where those are not the same."""
    others = [seed for seed, sample in theirs.items() if sample.void is None]
    if not ours or not others or set(ours) == set(others):
        return None
    return f"means over seeds {', '.join(ours)}, the baseline's over {', '.join(others)}"


def _baseline(drafts: list[Draft], job: str | None) -> tuple[list[Draft], list[str]]:
    """The arms of the baseline job, with nothing applied to them where they were measured so."""
    own = [draft for draft in drafts if draft.job == job]
    bare = [draft for draft in own if not draft.apply]
    if job is not None and not own:
        return [], [f"The baseline '{job}' has no measured model, so nothing is compared with it."]
    return bare or own, []


def _against(draft: Draft, drafts: list[Draft], baseline: list[Draft]) -> str | None:
    """The one baseline arm that has the same values on every axis both have; None if unclear."""
    if draft in baseline:
        return None
    fitting = [
        other
        for other in baseline
        if all(other.axes[key] == draft.axes[key] for key in other.axes.keys() & draft.axes.keys())
    ]
    return fitting[0].id if len(fitting) == 1 else None


def _front(
    metrics: Any, arms: tuple[Arm, ...], drafts: Mapping[str, Draft], layout: Layout
) -> Front | None:
    columns = [
        column
        for name in metrics
        if (column := next((c for c in layout.columns if c.metric == name and c.headline), None))
    ]
    if len(columns) < max(1, len(metrics)):
        return None
    excluded: dict[str, str] = {}
    for arm in arms:
        for column in columns:
            number = arm.number(column.id)
            if not number.stands:
                reason = number.void or number.missing or "no number"
                excluded.setdefault(arm.id, f"{METRICS[column.metric].title}: {reason}")
    able = {arm.id: arm for arm in arms if arm.id not in excluded}
    by_id = {column.id: column for column in columns}

    def means(column: str, one: str, two: str) -> tuple[float, float]:
        mine, theirs = able[one].number(column).value, able[two].number(column).value
        assert mine is not None
        assert theirs is not None
        return (mine, theirs) if by_id[column].kind.better == "lower" else (theirs, mine)

    def worse(column: str, one: str, two: str) -> bool:
        mine, theirs = means(column, one, two)
        if mine > theirs:
            return True
        # The shown means may be over different seeds: the seeds that both have decide as well.
        metric, key = by_id[column].kind, layout.key(by_id[column])
        found = mean_contrast(metric, drafts[one].samples[key], drafts[two].samples[key])
        return found is not None and (found if metric.better == "lower" else -found) > ROUNDING

    def better(column: str, one: str, two: str) -> bool:
        mine, theirs = means(column, one, two)
        metric, key = by_id[column].kind, layout.key(by_id[column])
        found = contrast(metric, drafts[one].samples[key], drafts[two].samples[key])
        return mine < theirs and found is not None and verdict(metric, found) == "better"

    members, dominated = front(list(able), list(by_id), worse, better)
    return Front(tuple(by_id), members, dominated, excluded)


def _unfronted(report: Mapping[str, Any], layout: Layout) -> list[str]:
    """Why there is no front, where some of its metrics were measured and others were not."""
    wanted = report.get("pareto") or ()
    held = {column.metric for column in layout.columns if column.headline}
    lacking = [METRICS[name].title for name in wanted if name not in held]
    if not lacking or len(lacking) == len(wanted):
        return []
    return [f"No Pareto front: nothing here measured {' or '.join(lacking)}."]


def _cost(draft: Draft) -> Cost | None:
    if not draft.costs:
        return None
    means = [sum(values) / len(draft.costs) for values in zip(*draft.costs, strict=True)]
    return Cost(means[0], means[1], means[2], means[3], draft.from_checkpoint)


def _curves(draft: Draft, layout: Layout, place: Place) -> dict[str, tuple[float | None, ...]]:
    """Setting -> the mean curve over seeds, for the settings of one place."""
    return {
        setting.id: curve
        for setting in layout.settings
        if setting.place == place
        if (curve := _mean_curve(draft.curves.get(layout.keys[setting.id], [])))
    }


def _mean_curve(curves: list[tuple[float | None, ...]]) -> tuple[float | None, ...]:
    """The mean over seeds at each position that every seed scored."""
    if not curves or len({len(curve) for curve in curves}) > 1:
        return curves[0] if curves else ()
    return tuple(
        None if None in column else sum(value or 0.0 for value in column) / len(column)
        for column in zip(*curves, strict=True)
    )


def _notes(arms: tuple[Arm, ...], measured: bool) -> list[str]:
    notes = []
    numbers = [(arm, number) for arm in arms for number in arm.numbers.values()]
    voided = {arm.id: number.void for arm, number in numbers if number.void}
    for reason, names in grouped(voided).items():
        notes.append(f"Void because {reason}: {listed(names)}.")
    lacking = {arm.id: n.missing for arm, n in numbers if n.value is not None and n.missing}
    notes += [f"{name}: {reason}." for name, reason in lacking.items()]
    unpaired = {arm.id: number.unpaired for arm, number in numbers if number.unpaired}
    notes += [
        f"{name}: {seeds}; ratios and the front rest on the seeds that both have."
        for name, seeds in unpaired.items()
    ]
    one_seed = any(number.value is not None and len(number.seeds) == 1 for _, number in numbers)
    if measured and one_seed:
        notes.append(
            "Some numbers come from one seed: nothing is known about how another seed would move "
            "them. Add seeds to find out."
        )
    notes += [f"{arm.id}: {problem}." for arm in arms for problem in arm.problems]
    return notes


def _open(jobs: tuple[JobRow, ...]) -> list[str]:
    count = sum(row.state not in TERMINAL for row in jobs)
    return [f"{count} {'job' if count == 1 else 'jobs'} unfinished."] if count else []


def _measured(drafts: list[Draft], arms: tuple[Arm, ...], layout: Layout) -> bool:
    measuring = any(draft.measurements for draft in drafts)
    shown = [column.id for column in layout.columns if column.setting or not measuring]
    return any(arm.number(column).value is not None for arm in arms for column in shown)


def _environments(jobs: tuple[JobRow, ...]) -> tuple[Mapping[str, Any], ...]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in jobs:
        environment = (row.result or {}).get("environment")
        if isinstance(environment, Mapping) and environment:
            found.setdefault(repr(sorted(environment.items(), key=str)), environment)
    return tuple(found.values())


def _states(jobs: Any) -> dict[str, int]:
    counted = Counter(JobState(row.state).value for row in jobs)
    return {state.value: counted[state.value] for state in JobState if counted[state.value]}
