"""Studies on a real Ray: trials are jobs like any others, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvlab.db.states import JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.controller import studies

pytestmark = pytest.mark.ray

KVLAB = [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()"]
STUDY = """
version: 1
name: studied
jobs:
  best:
    search:
      trial: {{noop: {{points: 2}}}}
      space: {space}
      objectives: {{noop.points: minimize}}
      trials: {trials}
      parallel: 2
      sampler: {sampler}
"""


def study(space: str = "{noop.points: {int: [1, 40]}}", trials: int = 6, sampler: str = "random"):
    return STUDY.format(space=space, trials=trials, sampler=sampler)


def result(workflow: Any) -> dict[str, Any]:
    (row,) = [row for row in workflow.jobs if row.kind == "search"]
    assert row.result is not None
    return row.result


def test_the_best_of_its_trials_is_found_and_each_is_a_job(run_text) -> None:
    outcome, workflow = run_text(study(trials=8))
    assert outcome.state is WorkflowState.DONE
    found = result(workflow)
    handed = [trial for trial in found["trials"] if trial["source"] != "repeat"]
    assert len(handed) == 8
    assert {trial["state"] for trial in handed} == {"complete"}
    values = {trial["number"]: trial["values"]["noop.points"] for trial in handed}
    assert values[found["best"]] == min(values.values())
    jobs = {row.job: row for row in workflow.jobs if row.kind == "noop"}
    assert {job: row.spec["points"] for job, row in jobs.items()} == {
        f"best/{number}/noop": value for number, value in values.items()
    }


def test_points_that_a_small_space_repeats_are_not_run_again(run_text) -> None:
    _, workflow = run_text(study("{noop.points: [3, 5]}", trials=9))
    found = result(workflow)
    assert sorted(row.spec["points"] for row in workflow.jobs if row.kind == "noop") == [3, 5]
    assert "all 2 feasible points are known" in found["ended"]


def test_an_equal_trial_of_an_earlier_study_is_reused(run_text) -> None:
    space = "{noop.points: [3, 5]}"
    run_text(study(space, trials=2))
    _, again = run_text(study(space, trials=2).replace("parallel: 2", "parallel: 1"))
    search = next(row for row in again.jobs if row.kind == "search")
    assert search.reused_from is not None  # the study itself: how many at once decides nothing
    _, other = run_text(study(space, trials=2, sampler="tpe"))
    noops = [row for row in other.jobs if row.kind == "noop"]
    assert [row.reused_from is not None for row in noops] == [True, True]


def test_a_trial_that_fails_ends_no_study(run_text) -> None:
    outcome, workflow = run_text(
        study("{noop.fail: [null, user, nan], noop.points: [2, 3]}", trials=6)
    )
    assert outcome.state is WorkflowState.DONE
    trials = [trial for trial in result(workflow)["trials"] if trial["source"] != "repeat"]
    states = Counter(trial["state"] for trial in trials)
    assert states == {"complete": 2, "failed": 4}
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert all("noop[seed=0]" in trial["message"] for trial in failed)


def test_a_study_without_a_complete_trial_fails(run_text) -> None:
    outcome, workflow = run_text(study("{noop.fail: [user, nan]}", trials=2))
    assert outcome.state is WorkflowState.FAILED
    search = next(row for row in workflow.jobs if row.kind == "search")
    assert search.message.startswith("no trial was completed: best/0/noop[seed=0]: ")


SLOW = study("{noop.points: {int: [1, 30]}, noop.sleep: {float: [0.2, 0.6]}}", trials=7)


@pytest.mark.parametrize("seconds", [0.1, 0.9, 1.7])
def test_a_killed_controller_loses_and_doubles_nothing(tmp_path: Path, seconds: float) -> None:
    """SIGKILL while trials run; `resume` ends with as many, each told once, none left running."""
    home = tmp_path / "home"
    (tmp_path / "study.yaml").write_text(SLOW)
    environment = {**os.environ, "KVLAB_HOME": str(home)}
    command = [
        *KVLAB,
        "run",
        str(tmp_path / "study.yaml"),
        "--no-mlflow",
        "--html",
        str(tmp_path / "r.html"),
    ]
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert running.stdout is not None
    next(line for line in running.stdout if "running  best/" in line)
    time.sleep(seconds)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    url = f"sqlite:///{home}/kvlab.db"
    with Store.open(url, read_only=True) as store:
        before = {row.id: row for row in store.load(1).jobs}
    again = subprocess.run(
        [*KVLAB, "resume", "1", "--no-mlflow", "--html", str(tmp_path / "r.html")],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    with Store.open(url, read_only=True) as store:
        after = {row.id: row for row in store.load(1).jobs}
        told = Counter(
            event.data["number"]
            for event in store.events(1)
            if event.kind == "trial" and event.data["state"] != "running"
        )
    assert {row.state for row in after.values()} == {JobState.DONE}
    assert told == dict.fromkeys(range(7), 1)
    trials = next(row.result for row in after.values() if row.kind == "search")["trials"]
    assert [trial["number"] for trial in trials] == list(range(7))
    # What was done before was not run again.
    for job, row in before.items():
        if row.state is JobState.DONE:
            assert after[job].attempt == row.attempt
    by_number = {f"best/{t['number']}/noop": t["values"]["noop.points"] for t in trials}
    noops = {row.job: row.spec["points"] for row in after.values() if row.kind == "noop"}
    assert noops == by_number
    json.dumps(trials, allow_nan=False)


WINDOWS = """
version: 1
name: windows
model: {{width: 32, layers: 2, heads: 2, tie_embeddings: true}}
data: {{source: {{folder: {text}}}, tokenizer: {{bytes: true}}, sequence_length: 32}}
jobs:
  best:
    search:
      trial:
        train: {{method: full_attention, tokens: {tokens}, batch_size: 4, {more}}}
        evaluate: {{metrics: [divergence], apply: {{sliding_window: {{}}}}}}
      space: {{sliding_window.window: [2, 4, 8, 16]}}
      objectives: [kl]
      trials: 4
      parallel: 4
"""


def test_what_trials_at_once_have_in_common_is_done_once(run_text, documents: Path) -> None:
    outcome, workflow = run_text(WINDOWS.format(text=documents, tokens="2k", more="warmup: 0"))
    assert outcome.state is WorkflowState.DONE
    trained = [row for row in workflow.jobs if row.kind == "train"]
    (own,) = [row for row in trained if row.reused_from is None]
    assert [row.reused_from for row in trained if row is not own] == [own.id] * 3
    assert [row.attempt for row in workflow.jobs if row.kind == "evaluate"] == [1] * 4
    assert {trial["state"] for trial in result(workflow)["trials"]} == {"complete"}


@pytest.mark.parametrize("where", ["judge", "next", "result", "__init__"])
def test_a_bug_ends_its_study_alone(run_text, home, monkeypatch, where) -> None:
    from kvlab.platform.search.study import Study

    def broken(self: Study, *given: Any, **named: Any) -> Any:
        if "best" in (given[1].name if where == "__init__" else self.trials.name):
            raise ZeroDivisionError("a bug\nof ours")
        return before(self, *given, **named)

    before = getattr(Study, where)
    monkeypatch.setattr(Study, where, broken)
    text = study(trials=3)
    other = text[text.index("  best:") :].replace("  best:", "  other:")
    outcome, workflow = run_text(text + other + "  after: {noop: {points: 77}}\n")
    assert outcome.state is WorkflowState.FAILED
    jobs = {row.name: row for row in workflow.jobs}
    assert jobs["best"].state is JobState.FAILED
    assert jobs["best"].message == "ZeroDivisionError: a bug of ours"
    assert jobs["other"].state is jobs["after[seed=0]"].state is JobState.DONE
    log = home.log(workflow.row.id, "best", jobs["best"].attempt).read_text()
    assert log.startswith("Traceback")
    assert "test_studies.py" in log
    monkeypatch.undo()
    resumed, workflow = run_text(workflow.row.id)
    assert resumed.state is WorkflowState.DONE


def test_what_the_sampler_breaks_on_ends_its_study(run_text, home, monkeypatch) -> None:
    """The thread that asks it passes on what was raised there."""
    from kvlab.platform.search.proposals import Proposals

    def ask(self: Proposals) -> None:
        raise ZeroDivisionError("in the sampler")

    monkeypatch.setattr(Proposals, "ask", ask)
    outcome, workflow = run_text(study() + "  after: {noop: {points: 77}}\n")
    assert outcome.state is WorkflowState.FAILED
    jobs = {row.name: row for row in workflow.jobs}
    assert jobs["best"].message == "ZeroDivisionError: in the sampler"
    assert jobs["after[seed=0]"].state is JobState.DONE
    assert "in ask" in home.log(workflow.row.id, "best", 1).read_text()


PRUNED = """
version: 1
name: pruned
model: {{width: 32, layers: 2, heads: 2, tie_embeddings: true}}
data: {{source: {{folder: {text}}}, tokenizer: {{bytes: true}}, sequence_length: 32}}
jobs:
  best:
    search:
      trial:
        train: {{method: full_attention, tokens: 60k, batch_size: 4, log_every: 4, warmup: 0}}
        evaluate: {{tokens: 500}}
      space: {{train.learning_rate: [0.003, 0.004, 0.005, 0.006, 0.007, 0.0000001, 0.0000002]}}
      start: [{start}]
      objectives: {objectives}
      trials: 7
      parallel: 1
      pruner: {pruner}
"""


@pytest.mark.parametrize("objectives", ["[perplexity]", "[perplexity, kv_bytes_per_token]"])
def test_what_learns_nothing_is_stopped(run_text, documents: Path, monkeypatch, objectives) -> None:
    """Five trials end; of two more, which hardly learn, none does: their curves are above all."""
    monkeypatch.setattr(studies, "CURVE_SECONDS", 0.1)
    rates = [0.003, 0.004, 0.005, 0.006, 0.007, 1e-7, 2e-7]
    start = ", ".join(f"{{train.learning_rate: {rate:.7f}}}" for rate in rates)
    text = PRUNED.format(text=documents, start=start, objectives=objectives, pruner="auto")
    if "kv" in objectives:
        text = text.replace(
            "      space",
            "        benchmark: {prompt: 8, generate: 4, batch: [1], repeats: 1}\n      space",
        )
    outcome, workflow = run_text(text)
    assert outcome.state is WorkflowState.DONE
    found = result(workflow)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 5 + ["pruned"] * 2
    assert found["best"] < 5
    saved = found["pruned"]
    assert saved["trials"] == [5, 6]
    assert saved["of"] == 7 * 469
    assert 0 < saved["steps"] < 2 * 469
    jobs = {row.name: row for row in workflow.jobs}
    assert jobs["best/5/train[seed=0]"].state is JobState.CANCELLED
    assert jobs["best/5/evaluate[seed=0]"].state is JobState.SKIPPED
