"""How points and results of a study are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvlab.platform.compare.formats import interval_text, percent_text, span_text, value_text
from kvlab.platform.compare.labels import listed, plain
from kvlab.platform.compare.metrics import metric_of
from kvlab.platform.compare.studies import COMPLETE, Confirmed, Study, Trial
from kvlab.platform.search.importance import LEAST_TRIALS
from kvlab.platform.search.rows import Direction

ALIKE = 0.0005
"""Relative difference below which two numbers are said to be one."""
GOALS: dict[Direction, str] = {"minimize": "minimise", "maximize": "maximise"}


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> its last part, or all of it where that would name two dimensions."""
    last = {path: path.rpartition(".")[2] for path in paths}
    often = Counter(last.values())
    return {path: path if often[name] > 1 else name for path, name in last.items()}


def setting_text(value: Any) -> str:
    """A dimension's value: four significant digits of a float, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def settings(study: Study, trial: Trial) -> list[str]:
    """`p=0.4501` and `share=0.5459`."""
    names = short_names(study.space)
    return [f"{names[path]}={setting_text(value)}" for path, value in trial.values.items()]


def title(study: Study) -> str:
    """One line: sampler, trials by state, objectives with their directions, constraints."""
    count = len(study.run)
    asked = f" of {study.asked}" if count != study.asked else ""
    states = ", ".join(f"{n} {state}" for state, n in study.states.items()) or "none begun"
    wanted = listed([f"{GOALS[goal]} {metric_of(n).title}" for n, goal in study.objectives.items()])
    limits = f"; {listed(study.constraints)}" if study.constraints else ""
    return f"{study.id}: {study.sampler}, {count}{asked} trials ({states}); {wanted}{limits}"


def trials_text(count: int) -> str:
    return f"{count} {'trial' if count == 1 else 'trials'}"


def studies_in_words(studies: Sequence[Study]) -> list[str]:
    """One sentence on each: what it found."""
    return [_sentence(study) for study in studies]


def remarks(study: Study) -> tuple[str, ...]:
    """What a reader of a study's table must know beside it, a line each."""
    found = [*_winner(study), *_importances(study), *_volume(study)]
    if study.promoted is not None:
        points = "1 point was" if study.promoted == 1 else f"{study.promoted or 'no'} points were"
        found.append(f"{points} promoted from the earlier study.".capitalize())
    if study.ended:
        found.append(f"It ended early: {study.ended}.")
    if study.pruned and study.pruned["trials"]:
        steps, of = study.pruned["steps"], study.pruned["of"]
        count = trials_text(len(study.pruned["trials"]))
        found.append(f"{count} pruned: {steps / of:.0%} of all training steps were not made.")
    found += _lost(study)
    found += _void(study)
    repeats = len(study.trials) - len(study.run)
    if repeats:
        points = "1 point was" if repeats == 1 else f"{repeats} points were"
        found.append(f"{points} proposed again, and answered without running.")
    return tuple(found)


def _sentence(study: Study) -> str:
    complete = study.states.get(COMPLETE, 0)
    if not complete:
        return f"{study.id}: no trial was completed."
    if not study.feasible:
        return f"{study.id}: none of {trials_text(complete)} meets {listed(study.constraints)}."
    limits = f" that meet {listed(study.constraints)}" if study.constraints else ""
    able = f"{trials_text(len(study.feasible))}{limits}"
    if study.best is None:
        names = listed([metric_of(name).title for name in study.objectives])
        verb = "is" if len(study.front) == 1 else "are"
        return f"{study.id}: of {able}, {len(study.front)} {verb} on the front of {names}."
    trial, (name, *_) = study.trial(study.best), study.objectives
    metric, number = metric_of(name), trial.numbers[name]
    text = value_text(metric, trial.value(name))
    said = f"void: {number.void}" if number.void else interval_text(metric, number)
    which = "lowest" if study.objectives[name] == "minimize" else "highest"
    return (
        f"{study.id}: of {able}, trial {trial.number} has the {which} {metric.title}, {text} "
        f"({'counted' if metric.exact and not number.void else said}), at "
        f"{', '.join(settings(study, trial))}."
    )


def _winner(study: Study) -> list[str]:
    if study.best is None:
        return []
    trial, (objective, *_) = study.trial(study.best), study.objectives
    found = []
    if void := trial.numbers[objective].void:
        found.append(f"Trial {trial.number}, the best, is void ({void}): compared with nothing.")
    changes = [
        f"{metric_of(name).title} {span_text(metric_of(name), change)}"
        + (", not distinguished" if change.verdict == "not distinguished" else "")
        for name in study.metrics
        if (change := trial.numbers[name].change) is not None
    ]
    if changes:
        found.append(f"Trial {trial.number} against {study.against}: {'; '.join(changes)}.")
    if study.confirmed is not None:
        found += _again(study, trial, study.confirmed)
    elif len(study.feasible) > 1 and not metric_of(objective).exact:
        found.append(
            f"Trial {trial.number} was chosen by its own {metric_of(objective).title} out of "
            f"{len(study.feasible)}: measured again, expect it to be worse."
        )
    return found


def _again(study: Study, trial: Trial, again: Confirmed) -> list[str]:
    """How far the winner falls back to the mean: on fresh seeds nobody chose it."""
    seeds = f"{len(again.seeds)} fresh {'seed' if len(again.seeds) == 1 else 'seeds'}"
    if again.message is not None:
        return [f"Trial {trial.number} could not be measured on {seeds}: {again.message}."]
    said = []
    for name, number in again.numbers.items():
        metric, before = metric_of(name), trial.numbers.get(name)
        if number.value is None or before is None or before.value is None:
            continue
        ratio = number.value / before.value if before.value else 1.0
        moved = f"{percent_text(ratio)} {'above' if ratio > 1 else 'below'} its trial's"
        span = "" if metric.exact else f" ({interval_text(metric, number)})"
        said.append(
            f"{metric.title} {value_text(metric, number.value)}{span}, "
            + ("as in its trial" if abs(ratio - 1) < ALIKE else moved)
        )
    return [f"Trial {trial.number} again, on {seeds}: {'; '.join(said)}."]


def _importances(study: Study) -> list[str]:
    if study.importances is None:
        return [f"Importance of parameters: not known below {LEAST_TRIALS} complete trials."]
    names = short_names(study.space)
    return [
        f"Importance for {metric_of(objective).title}: "
        + (", ".join(f"{names[path]} {share:.2f}" for path, share in shares.items()) or "none")
        + "."
        for objective, shares in study.importances.items()
    ]


def _volume(study: Study) -> list[str]:
    if not study.progress.hypervolume:
        return []
    share = f"{study.progress.hypervolume[-1]:.1%}".replace("%", " %")
    return [
        f"Hypervolume: {share} of the box from the best values of this study to a tenth beyond "
        "its worst."
    ]


def _lost(study: Study) -> list[str]:
    failed = [trial for trial in study.run if trial.state == "failed"]
    if not failed:
        return []
    first = "" if len(failed) == 1 else "first "
    said = f"{first}trial {failed[0].number} ({failed[0].message})"
    return [f"{trials_text(len(failed))} failed: {said}."]


def _void(study: Study) -> list[str]:
    void: Mapping[int, str] = {t.number: t.void for t in study.run if t.void}
    if not void:
        return []
    reasons = "; ".join(sorted(set(void.values())))
    return [f"{trials_text(len(void))} with void numbers, ranked all the same: {reasons}."]
