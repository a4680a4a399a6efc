"""A plan says what is there, what is stale and why, and what the rest will cost."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvlab.db.rows import NewJob
from kvlab.db.states import Cause, JobState, WorkflowState
from kvlab.db.store import Store
from kvlab.platform.graph import Graph, Resources
from kvlab.platform.planning import plan, render
from kvlab.platform.planning.history import CORE_FLOPS, History
from kvlab.platform.spec.read import load_graph

KVLAB = [sys.executable, "-c", "from kvlab.platform.cli.main import main; main()"]

TEXT = """\
version: 1
name: planned
seeds: [0, 1]
model: {preset: nano}
data: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}
jobs:
  base: {train: {method: full_attention, tokens: 10k}}
  block: {uptrain: {from: base, method: {block_transformer: {block_length: 2}}, tokens: 5k}}
  quality: {evaluate: {of: [base, block], tokens: 5k}}
  speed: {benchmark: {of: base, prompt: 8, generate: 8, batch: [1, 2], repeats: 2, warmup: 1}}
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/kvlab.db"


Finish = Callable[..., None]


@pytest.fixture
def finish(url: str) -> Finish:
    """Store a graph as a workflow of which every job took so many seconds."""

    def run(graph: Graph, seconds: float, **result: object) -> None:
        jobs = [
            NewJob(
                cell.name, cell.job, cell.kind, cell.spec, cell.axes, cell.parents, cell.needs,
                cell.identity, cell.parts,
            )
            for cell in graph.cells
        ]  # fmt: skip
        with Store.open(url) as store:
            number = store.create_workflow(graph.name, graph.text, {}, jobs, 0.0)
            ids = [job.id for job in store.status(number).jobs]
            waiting = [job.id for job in store.status(number).jobs if job.state is JobState.WAITING]
            lease = store.claim(number, "test", 1e9, 0.0)
            with store.batch(lease, 1000.0) as batch:
                for job in waiting:
                    batch.move(job, JobState.QUEUED)
            with store.batch(lease, 1000.0) as batch:
                for job in ids:
                    batch.start(job, "worker")
            with store.batch(lease, 1000.0 + seconds) as batch:
                for job in ids:
                    batch.end(job, 1, Cause.DONE, JobState.DONE, result={"loss": 1.0, **result})
            store.release(lease, WorkflowState.DONE, 1000.0 + seconds)

    return run


def planned(text: str, url: str) -> dict[str, plan.Planned]:
    graph = load_graph(text)
    return {p.cell.name: p for p in plan.make(graph, plan.look_up(graph, url)).cells}


def test_without_a_store_everything_is_to_run_and_none_is_made(url: str, tmp_path: Path) -> None:
    cells = planned(TEXT, url)
    assert {p.state for p in cells.values()} == {"to run"}
    assert list(tmp_path.iterdir()) == []


def test_what_finished_is_reusable_and_the_reason_of_the_rest_is_named(
    url: str, finish: Finish
) -> None:
    finish(load_graph(TEXT), 2.0)
    assert {p.state for p in planned(TEXT, url).values()} == {"reusable"}
    renamed = TEXT.replace("name: planned", "name: other")
    assert {p.state for p in planned(renamed, url).values()} == {"reusable"}
    changed = planned(TEXT.replace("tokens: 5k}}\n  quality", "tokens: 6k}}\n  quality"), url)
    assert (changed["base[seed=0]"].state, changed["base[seed=0]"].why) == ("reusable", "")
    assert (changed["block[seed=0]"].state, changed["block[seed=0]"].why) == (
        "stale",
        "tokens 5000 -> 6000",
    )
    assert changed["quality[of=block,seed=0]"].why == "parent of"
    assert changed["quality[of=base,seed=0]"].state == "reusable"


def test_a_void_measurement_is_stale(url: str, finish: Finish) -> None:
    finish(load_graph(TEXT), 2.0, gates={"alone": False})
    speed = planned(TEXT, url)["speed[seed=0]"]
    assert (speed.state, speed.why) == ("stale", "its measurement was void")


def test_a_job_that_never_ran_is_not_stale(url: str, finish: Finish) -> None:
    finish(load_graph(TEXT), 2.0)
    more = planned(TEXT + "  wide: {train: {method: full_attention, tokens: 20k}}\n", url)
    assert (more["wide[seed=0]"].state, more["wide[seed=0]"].why) == ("to run", "")


def test_time_comes_from_jobs_like_it_then_from_its_kind_then_from_a_stated_rate(
    url: str, finish: Finish
) -> None:
    base = planned(TEXT, url)["base[seed=0]"]
    assert base.duration is not None
    assert base.duration.basis == "assumed rate"
    assert base.duration.seconds == base.prediction.flops / CORE_FLOPS  # type: ignore[operator]
    finish(load_graph(TEXT), 8.0)
    again = planned(TEXT.replace("tokens: 10k", "tokens: 10k, learning_rate: 0.001"), url)
    like = again["base[seed=0]"].duration
    assert like is not None
    assert (like.seconds, like.basis) == (8.0, "like jobs")
    twice = planned(TEXT.replace("tokens: 10k", "tokens: 20k"), url)["base[seed=0]"].duration
    assert twice is not None
    assert twice.basis == "rate of its kind"
    assert twice.seconds == pytest.approx(16.0)
    data = again["data"].duration
    assert data is not None
    assert (data.seconds, data.basis) == (8.0, "like jobs")


def test_more_workers_and_gpus_are_assumed_to_be_faster() -> None:
    from kvlab.platform.jobs.kind import Prediction

    work, history = Prediction(flops=1e15), History()
    times = []
    for shape in (Resources(), Resources(cpus=2), Resources(cpus=2, workers=2), Resources(gpus=1)):
        duration = history.predict("train", work, shape)
        assert duration is not None
        times.append(duration.seconds)
    assert times == sorted(times, reverse=True)
    assert times[0] == 4 * times[2]


def test_predictions_are_those_of_the_method(url: str) -> None:
    cells = planned(TEXT, url)
    base, block = cells["base[seed=0]"].prediction, cells["block[seed=0]"].prediction
    # nano: 4 layers of 2 x 4 heads x 32 dimensions, 4 bytes each
    assert base.kv_bytes_per_token == 4 * 2 * 4 * 32 * 4
    assert block.kv_bytes_per_token is not None
    assert block.kv_bytes_per_token < base.kv_bytes_per_token / 2
    assert base.body_parameters is not None
    assert base.parameters == base.body_parameters + 512 * 128
    speed = cells["speed[seed=0]"].prediction
    assert speed.flops is not None
    assert speed.flops > 0


def test_plan_shows_what_sharing_saves_and_costs(url: str) -> None:
    bottom = "{cross_layer: {layout: pizza_bottom, kv_layers: 2}}"
    upward = "{cross_layer: {layout: sandwich_top, kv_layers: 2}}"
    text = TEXT
    for name, method in (("bottom", bottom), ("upward", upward)):
        text += f"  {name}: {{train: {{method: {method}, tokens: 10k}}}}\n"
    cells = planned(text, url)
    base, low, up = (cells[f"{n}[seed=0]"].prediction for n in ("base", "bottom", "upward"))
    assert low.kv_bytes_per_token == up.kv_bytes_per_token == base.kv_bytes_per_token / 2  # type: ignore[operator]
    assert low.body_parameters == up.body_parameters == base.body_parameters - 4 * 128 * 128  # type: ignore[operator]
    assert low.flops < base.flops < up.flops / 2  # type: ignore[operator]


def test_json_holds_every_cell(url: str) -> None:
    graph = load_graph(TEXT)
    said = json.loads(json.dumps(render.as_json(plan.make(graph, plan.Known()))))
    assert said["states"] == {"to run": len(graph.cells)}
    assert [job["name"] for job in said["jobs"]] == [cell.name for cell in graph.cells]
    (up,) = [job for job in said["jobs"] if job["name"] == "block[seed=1]"]
    assert up["parents"] == {"from": "base[seed=1]", "data": "data"}
    assert up["seconds_from"] == "assumed rate"


def shown(text: str, known: plan.Known | None = None) -> str:
    output = io.StringIO()
    render.show(plan.make(load_graph(text), known or plan.Known()), Console(file=output, width=160))
    return output.getvalue()


def test_the_table_shows_joined_cells_and_folds_seeds() -> None:
    lines = shown(TEXT).splitlines()
    (block,) = [line for line in lines if line.startswith("quality[of=block]")]
    assert block.split()[:4] == ["quality[of=block]", "evaluate", "block", "0,1"]
    assert "2 to run" in block
    assert lines[-3].startswith("11 jobs: 11 to run. Job time to run, one after the other: ")


def test_a_partly_finished_line_says_so() -> None:
    graph = load_graph(TEXT)
    base = next(cell for cell in graph.cells if cell.name == "base[seed=0]")
    old = {**base.parts, "tokens": "1"}
    known = plan.Known(frozenset({base.identity}), {"base[seed=1]": old | {"seed": "1"}})
    (line,) = [line for line in shown(TEXT, known).splitlines() if line.startswith("base")]
    assert "1 reusable, 1 stale (tokens 1 -> 10000)" in line


def test_json_and_text_agree_on_the_seconds_to_run() -> None:
    graph = load_graph(TEXT)
    known = plan.Known(frozenset(cell.identity for cell in graph.cells[:3]))
    made = plan.make(graph, known)
    said = render.as_json(made)
    waiting = [job for job in said["jobs"] if job["state"] != "reusable"]
    assert said["seconds"] == pytest.approx(sum(job["seconds"] or 0.0 for job in waiting))
    total = render.seconds(said["seconds"])
    assert f"one after the other: {total}." in shown(TEXT, known)


def test_a_job_of_unknown_duration_is_named() -> None:
    assert "time of data: unknown" in shown(TEXT)
    jobs = "".join(f"  n{n}: {{noop: {{}}}}\n" for n in range(5))
    said = shown(f"version: 1\nname: n\njobs:\n{jobs}")
    assert "time of n0[seed=0], n1[seed=0], n2[seed=0] and 2 more: unknown" in said


STUDY = """\
  blocks:
    search:
      trial:
        uptrain: {from: base, method: {block_transformer: {}}, tokens: 5k}
        evaluate: {tokens: 5k}
      space: {block_transformer.block_length: [2, 4, 8]}
      objectives: [perplexity]
      trials: 10
  windows:
    search:
      trial:
        train: {method: full_attention, tokens: 10k}
        evaluate: {metrics: [divergence], apply: {sliding_window: {}}}
      space: {sliding_window.window: {int: [8, 32]}}
      objectives: [kl]
      trials: 10
"""


def test_a_study_shows_its_jobs_and_what_they_come_to(url: str) -> None:
    """From the smallest trial to the largest; jobs that all trials have in common count once."""
    cells = planned(TEXT + STUDY, url)
    blocks, windows = cells["blocks"].study, cells["windows"].study
    assert blocks is not None
    assert (blocks.trials, blocks.seeds, blocks.kinds) == (10, 2, ("uptrain", "evaluate"))
    block = cells["block[seed=0]"].prediction
    quality = cells["quality[of=block,seed=0]"].prediction
    assert blocks.flops is not None
    assert blocks.kv_bytes_per_token is not None
    # Blocks of two are the dearest, and the cell `block` is one of those.
    assert blocks.flops[1] == pytest.approx(20 * (block.flops + quality.flops), rel=0.02)  # type: ignore[operator]
    assert blocks.flops[0] < 0.9 * blocks.flops[1]
    assert blocks.kv_bytes_per_token[1] == quality.kv_bytes_per_token
    assert blocks.kv_bytes_per_token[0] < 0.5 * blocks.kv_bytes_per_token[1]
    trained = cells["base[seed=0]"].prediction.flops
    twice = planned(TEXT + STUDY.replace("trials: 10", "trials: 20"), url)["windows"].study
    assert windows is not None
    assert twice is not None
    for one, two in zip(windows.flops or (), twice.flops or (), strict=True):
        assert 2 * one - two == pytest.approx(2 * trained)  # type: ignore[operator]
    lines = shown(TEXT + STUDY).splitlines()
    line = next(line for line in lines if line.startswith("blocks"))
    assert "search, 10 x (uptrain, evaluate)" in line
    low, high = (render.quantity(end) for end in blocks.flops)
    assert f" {low}..{high} " in line
    assert any(one.startswith("time of windows, blocks: unknown: it is") for one in lines)
    graph = load_graph(TEXT + STUDY)
    said = render.as_json(plan.make(graph, plan.Known()))["jobs"]
    assert [job["name"] for job in said if job["study"]] == ["windows", "blocks"]
    json.dumps(said)


def test_the_time_of_another_study_says_nothing_of_this_one() -> None:
    known = plan.Known(history=History(seen={"search": [(0.0, 2.6)]}))
    cells = {one.cell.name: one for one in plan.make(load_graph(TEXT + STUDY), known).cells}
    assert cells["blocks"].duration is None
    assert cells["windows"].duration is None
    said = shown(TEXT + STUDY, known)
    assert "time of windows, blocks: unknown: it is that of the jobs of their trials" in said


@pytest.mark.parametrize("width", [60, 100, 200])
def test_names_are_whole_at_any_width(width: int) -> None:
    text = TEXT.replace("  block: {", "  block: {matrix: {uptrain.learning_rate: [1e-3, 2e-3]}, ")
    graph = load_graph(text)
    output = io.StringIO()
    render.show(plan.make(graph, plan.Known()), Console(file=output, width=width))
    said = output.getvalue()
    for name in ("quality[learning_rate=0.001,of=block]", " block[learning_rate=0.002] "):
        assert name in said


def test_large_plans_are_summed_up() -> None:
    rates = ", ".join(str(n / 1000) for n in range(1, 121))
    many = TEXT.replace("  base: {", f"  base: {{matrix: {{train.learning_rate: [{rates}]}}, ")
    lines = shown(many).splitlines()
    assert len(lines) < 12
    assert lines[2].split()[:3] == ["base", "train", "240"]
    jobs = "".join(f"  n{n}: {{noop: {{}}}}\n" for n in range(120))
    lines = shown(f"version: 1\nname: n\njobs:\n{jobs}").splitlines()
    assert lines[1].split()[:2] == ["noop", "120"]


def test_ten_thousand_jobs_take_seconds(url: str, tmp_path: Path, finish: Finish) -> None:
    """The whole command on half-finished work: 3 s are promised on an idle machine.

    CPU time is what is held to a bound: other work shares the machine that tests run on.
    """
    rates = ", ".join(str(n / 10_000) for n in range(1, 101))
    text = TEXT.replace("[0, 1]", str(list(range(20)))).replace(
        "  base: {", f"  base: {{matrix: {{train.learning_rate: [{rates}]}}, "
    )
    path = tmp_path / "large.yaml"
    path.write_text(text)
    graph = load_graph(path)
    half = [cell for cell in graph.cells if cell.job in ("data", "base", "speed")]
    finish(replace(graph, cells=tuple(half)), 1.0)
    env = {**os.environ, "KVLAB_HOME": str(tmp_path)}
    began, used = time.perf_counter(), _children()
    ended = subprocess.run(
        [*KVLAB, "plan", str(path)], env=env, capture_output=True, text=True, check=True
    )
    wall, used = time.perf_counter() - began, _children() - used
    assert len(graph.cells) == 10_001
    states = Counter({"reusable": 4001, "to run": 6000})
    assert ended.stdout.splitlines()[6].startswith(
        f"10001 jobs: {states['reusable']} reusable, {states['to run']} to run."
    )
    print(f"10,001 jobs planned in {wall:.2f} s, {used:.2f} s of CPU")
    assert used < 6


def _children() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
