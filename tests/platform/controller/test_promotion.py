"""Studies that go on from another one, and winners that are measured again, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.db.states import JobState, WorkflowState
from kvlab.platform.compare.studies import read_studies
from kvlab.platform.compare.study_words import remarks

pytestmark = pytest.mark.ray

PROMOTED = """
version: 1
name: promoted
jobs:
  cheap:
    search:
      trial: {noop: {points: 2}}
      space: {noop.points: {int: [1, 40]}}
      objectives: {noop.points: minimize}
      trials: 6
      sampler: random
  whole:
    search:
      from: cheap
      promote: 2
      trial: {noop: {points: 2, sleep: 0.01}}
      space: {noop.points: {int: [1, 40]}, noop.checkpoints: [0, 1]}
      objectives: {noop.points: maximize}
      trials: 4
      sampler: random
"""


def trials(workflow: Any, name: str) -> list[dict[str, Any]]:
    row = next(row for row in workflow.jobs if row.name == name)
    return [trial for trial in row.result["trials"] if trial["source"] != "repeat"]


def test_the_best_points_of_a_study_are_the_first_of_the_next(run_text) -> None:
    outcome, workflow = run_text(PROMOTED)
    assert outcome.state is WorkflowState.DONE
    cheap = sorted(trial["values"]["noop.points"] for trial in trials(workflow, "cheap"))
    whole = trials(workflow, "whole")
    assert [trial["values"]["noop.points"] for trial in whole[:2]] == cheap[:2]
    assert [trial["source"] for trial in whole] == ["enqueued"] * 2 + ["sampler"] * 2
    assert all("noop.checkpoints" in trial["values"] for trial in whole)
    # Both draw at random from one seed, and yet not the same points.
    drawn = [trial["values"]["noop.points"] for trial in trials(workflow, "cheap")]
    assert [trial["values"]["noop.points"] for trial in whole[2:]] != drawn[:2]
    study = next(study for study in read_studies(workflow.jobs) if study.id == "whole")
    assert "2 points were promoted from the earlier study." in remarks(study)


CONFIRMED = """
version: 1
name: confirmed
seeds: [0, 1]
model: {{width: 32, layers: 2, heads: 2, tie_embeddings: true}}
data: {{source: {{folder: {text}}}, tokenizer: {{bytes: true}}, sequence_length: 32}}
jobs:
  rates:
    search:
      trial:
        train: {{method: full_attention, tokens: 1k, batch_size: 4}}
        evaluate: {{tokens: 500}}
      space: {{train.learning_rate: [0.0003, 0.01]}}
      objectives: [perplexity]
      sampler: grid
      trials: 2
      confirm: 3
"""


def test_the_winner_runs_again_on_seeds_that_nobody_has_seen(run_text, documents: Path) -> None:
    _, workflow = run_text(CONFIRMED.format(text=documents))
    row = next(row for row in workflow.jobs if row.name == "rates")
    confirmed = row.result["confirmed"]
    best = next(t for t in row.result["trials"] if t["number"] == row.result["best"])
    # As many for each of the study's two seeds: three would favour the first.
    assert (confirmed["of"], confirmed["seeds"]) == (best["number"], [2, 3, 4, 5])
    again = [job for job in workflow.jobs if job.job == "rates/confirm/train"]
    assert [(job.axes["seed"], job.state) for job in again] == [
        (seed, JobState.DONE) for seed in confirmed["seeds"]
    ]
    rate = best["values"]["train.learning_rate"]
    assert {job.spec["learning_rate"] for job in again} == {rate}
    numbers = confirmed["measured"]["perplexity"]["seeds"]
    assert list(numbers) == ["2", "3", "4", "5"]
    assert not set(numbers.values()) & set(best["measured"]["perplexity"]["seeds"].values())
    study = next(study for study in read_studies(workflow.jobs) if study.id == "rates")
    (said,) = [line for line in remarks(study) if "fresh seeds" in line]
    assert said.startswith(f"Trial {best['number']} again, on 4 fresh seeds: perplexity ")
    assert not any("expect it to be worse" in line for line in remarks(study))
