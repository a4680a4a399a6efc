"""Studies that go on from another one, and winners that are measured again, on a real Ray."""

from __future__ import annotations

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
      confirm: 2
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


def test_the_winner_runs_again_on_seeds_that_nobody_has_seen(run_text) -> None:
    _, workflow = run_text(PROMOTED)
    row = next(row for row in workflow.jobs if row.name == "whole")
    confirmed = row.result["confirmed"]
    assert (confirmed["of"], confirmed["seeds"]) == (row.result["best"], [1, 2])
    again = [job for job in workflow.jobs if job.job == "whole/confirm/noop"]
    assert [(job.axes["seed"], job.state) for job in again] == [
        (1, JobState.DONE),
        (2, JobState.DONE),
    ]
    best = next(t for t in row.result["trials"] if t["number"] == row.result["best"])
    assert {job.spec["points"] for job in again} == {best["values"]["noop.points"]}
    assert set(confirmed["measured"]["noop.points"]["seeds"]) == {"1", "2"}
    study = next(study for study in read_studies(workflow.jobs) if study.id == "whole")
    said = [line for line in remarks(study) if "fresh seeds" in line]
    points = float(best["values"]["noop.points"])
    assert said == [
        f"Trial {best['number']} again, on 2 fresh seeds: noop.points {points} "
        f"(95 % interval {points} to {points}), as in its trial."
    ]
