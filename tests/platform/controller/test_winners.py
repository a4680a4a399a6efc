"""What builds on a search's winner, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.platform.cli.export import published

pytestmark = pytest.mark.ray

LONGER = """
version: 1
name: longer
seeds: [0, 1]
model: {{width: 32, layers: 2, heads: 2, tie_embeddings: true}}
data: {{source: {{folder: {text}}}, tokenizer: {{bytes: true}}, sequence_length: 32}}
jobs:
  base:
    train: {{method: full_attention, tokens: 2k, batch_size: 4}}
  best:
    search:
      trial:
        uptrain: {{from: base, method: {{block_transformer: {{}}}}, tokens: 1k, batch_size: 4}}
        evaluate: {{tokens: 500}}
      space: {{block_transformer.block_length: [2, 4, 8]}}
      objectives: {objectives}
      constraints: {{perplexity: "<= 100 * base"}}
      trials: 3
      parallel: {parallel}
  longer:
    uptrain: {{from: best.best, tokens: 2k, batch_size: 4}}
  quality:
    evaluate: {{of: [longer, base], tokens: 500}}
"""


def test_the_winner_is_trained_longer(run_text, home, documents: Path, monkeypatch) -> None:
    """What it is shows when it is found; jobs below it are resolved against it, once for all."""
    text = LONGER.format(text=documents, objectives="[train_flops]", parallel=2)
    outcome, workflow = run_text(text)
    assert outcome.state is WorkflowState.DONE
    jobs = {row.name: row for row in workflow.jobs}
    found = result(workflow)
    # The longest blocks take the fewest FLOPs.
    winner = next(trial for trial in found["trials"] if trial["number"] == found["best"])
    assert winner["values"] == {"block_transformer.block_length": 8}
    for seed in (0, 1):
        longer = jobs[f"longer[seed={seed}]"]
        assert longer.parents["from"] == f"best/{found['best']}/uptrain[seed={seed}]"
        assert longer.spec["method"]["granularity"]["block_transformer"]["block_length"] == 8
        assert "deferred" not in longer.spec
        # Scored from where the winner can: not where the model that stood in for it could.
        assert jobs[f"quality[of=base,seed={seed}]"].spec["first_target"] == 8
    # `kvlab serve best` and `kvlab export best` take the winner.
    monkeypatch.setenv("KVLAB_HOME", str(home.root))
    assert published("best", "longer") == Path(
        jobs[f"best/{found['best']}/uptrain[seed=0]"].artifact_uri
    )
    # Trials and baseline are scored on the same targets, wherever a trial's first block ends.
    targets = {
        row.result["targets"]["hash"] for row in workflow.jobs if row.job.endswith("/evaluate")
    }
    assert len(targets) == 1
    assert found["baseline"]["perplexity"]["value"] > 1

    _, again = run_text(text.replace("parallel: 2", "parallel: 1"))
    assert {row.name: row.identity for row in again.jobs if "/" not in row.job} == {
        row.name: row.identity for row in workflow.jobs if "/" not in row.job
    }
    assert not any(row.attempt for row in again.jobs)  # the study, and all below its winner


def test_a_winner_that_later_jobs_cannot_take(run_text, documents: Path) -> None:
    """The study keeps what it found; the job that cannot take it says why, and may try again."""
    text = LONGER.format(text=documents, objectives="[train_flops]", parallel=2)
    text = text.replace("of: [longer, base], tokens: 500", "of: longer, sequence_length: 12")
    text = text.replace("[2, 4, 8]", "[2, 4, 16]") + "  after: {noop: {}, needs: [quality]}\n"
    text += "  direct: {evaluate: {of: best.best, sequence_length: 12}}\n"
    outcome, workflow = run_text(text)
    assert outcome.state is WorkflowState.FAILED
    jobs = {row.name: row for row in workflow.jobs}
    assert jobs["best"].state is JobState.DONE
    assert result(workflow)["best"] is not None
    assert jobs["longer[seed=0]"].state is JobState.DONE
    failed = jobs["quality[seed=0]"]
    assert (failed.state, failed.cause) == (JobState.FAILED, Cause.USER_ERROR)
    assert failed.message.startswith("evaluate.sequence_length: must be two or more blocks")
    direct = jobs["direct[seed=1]"].message
    winner = f"best/{result(workflow)['best']}/uptrain[seed=1]"
    assert direct.startswith(f"it cannot build on best.best ({winner}): evaluate.sequence_length")
    assert jobs["after[seed=0]"].state is JobState.SKIPPED
    _, again = run_text(workflow.row.id)
    retried = next(row for row in again.jobs if row.name == "quality[seed=0]")
    assert (retried.state, retried.attempt, retried.message) == (
        JobState.FAILED, 2, failed.message,
    )  # fmt: skip


def test_without_a_winner_what_builds_on_it_fails(run_text, documents: Path) -> None:
    """The study is done, has its sheet, and is reused as it is."""
    text = LONGER.format(text=documents, objectives="[train_flops]", parallel=2)
    text = text.replace("<= 100 * base", "<= 0.5").replace("seeds: [0, 1]", "seeds: [0]")
    for _ in range(2):
        outcome, workflow = run_text(text)
        assert outcome.state is WorkflowState.FAILED
        jobs = {row.name: row for row in workflow.jobs}
        assert (jobs["best"].state, jobs["best"].result["best"]) == (JobState.DONE, None)
        assert jobs["longer[seed=0]"].state is JobState.FAILED
        said = "no trial of best meets perplexity <= 0.5: there is no winner to go on from"
        assert jobs["longer[seed=0]"].message == said
        assert jobs["quality[of=longer,seed=0]"].state is JobState.SKIPPED
        # Which tokens all models are scored on is not known without the one that is not there.
        beside = jobs["quality[of=base,seed=0]"]
        assert (beside.state, beside.message) == (JobState.FAILED, f"longer[seed=0]: {said}")
    assert jobs["best"].reused_from is not None


TWO = """
  other:
    search:
      trial: {{evaluate: {{of: base, metrics: [divergence], apply: {{sliding_window: {{}}}}}}}}
      space: {{sliding_window.window: [4, 8]}}
      objectives: [kl]
      trials: 2
  both:
    evaluate: {{of: [best.best, other.best], tokens: 500, apply: full_attention}}
"""


def test_a_job_may_wait_for_two_winners(run_text, documents: Path) -> None:
    text = LONGER.format(text=documents, objectives="[train_flops]", parallel=2)
    text = text[: text.index("  longer:")].replace("seeds: [0, 1]", "seeds: [0]")
    outcome, workflow = run_text(text + TWO.format()[1:])
    assert outcome.state is WorkflowState.DONE
    jobs = {row.name: row for row in workflow.jobs}
    best = jobs["best"].result["best"]
    assert jobs["both[of=best,seed=0]"].parents["of"] == f"best/{best}/uptrain[seed=0]"
    assert jobs["both[of=other,seed=0]"].parents["of"] == "base[seed=0]"
    both = [jobs[f"both[of={one},seed=0]"] for one in ("best", "other")]
    assert {row.spec["first_target"] for row in both} == {8}


def result(workflow: Any) -> dict[str, Any]:
    (row,) = [row for row in workflow.jobs if row.kind == "search"]
    assert row.result is not None
    return row.result
