"""How well controllers tell what full attention attends to, beside rules that learn nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.db.rows import JobRow
from kvlab.db.states import JobState

CONTROLLER, LABEL = "controller", "label"
RULES = {"h2o": "attention received so far", "recency": "the newest first"}


@dataclass(frozen=True, slots=True)
class Guess:
    """One that says which tokens matter, on the held-out texts of a label job.

    Attributes:
        id: of the controller job; or of a rule. labels: the label job. learned: it is no rule.
        recall: m -> share of the labelled tokens that are among its m best. precision: at as many
            as are labelled. parameters: None for a rule.
    """

    id: str
    labels: str
    learned: bool
    top: int
    recall: Mapping[int, float]
    precision: float
    parameters: int | None


def read_guesses(jobs: Sequence[JobRow]) -> tuple[Guess, ...]:
    """Return those of a workflow's finished label and controller jobs, by label job."""
    done = [row for row in jobs if row.state is JobState.DONE and row.result]
    found: list[Guess] = []
    for label in (row for row in done if row.kind == LABEL):
        for row in done:
            if row.kind == CONTROLLER and row.parents.get("labels") == label.name:
                found.append(_guess(row.name, label, row.result or {}, learned=True))
        for rule, result in (label.result or {})["rivals"].items():
            found.append(_guess(RULES.get(rule, rule), label, result, learned=False))
    return tuple(found)


def guesses_in_words(guesses: Sequence[Guess]) -> list[str]:
    """One sentence on each controller that some rule is no worse than."""
    sentences = []
    for guess in guesses:
        m = min(guess.recall, default=None)
        if not guess.learned or m is None:
            continue
        better = [
            other.id
            for other in guesses
            if not other.learned
            and other.labels == guess.labels
            and other.recall[m] >= guess.recall[m]
        ]
        if better:
            sentences.append(
                f"Controller {guess.id} finds no more of the labelled tokens than "
                f"{' and '.join(better)} (recall at {m})."
            )
    return sentences


def _guess(name: str, label: JobRow, result: Mapping[str, Any], *, learned: bool) -> Guess:
    return Guess(
        id=name,
        labels=label.name,
        learned=learned,
        top=label.spec["top"],
        recall={int(m): share for m, share in result["recall"].items()},
        precision=result["precision"],
        parameters=result.get("parameters"),
    )
