"""From a point to the jobs of a trial, without a controller."""

from __future__ import annotations

from typing import Any

import pytest

from kvlab import KvlabError
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.search.described import corners, dimensions
from kvlab.platform.search.outcome import Done, excess, measured
from kvlab.platform.search.space import Dimension, Space
from kvlab.platform.search.trials import Trials
from kvlab.platform.search.values import placed
from kvlab.platform.spec.read import load_graph

H2O: dict[str, Any] = {"h2o": {}, "uniform": {"share": 0.5}}


def test_a_parameter_is_set_wherever_the_trial_names_its_method() -> None:
    trial = {"evaluate": {"of": "base", "apply": dict(H2O)}, "benchmark": {"apply": "h2o"}}
    found = placed(trial, {"h2o.recent": 0.3})
    assert found["evaluate"]["apply"] == {"h2o": {"recent": 0.3}, "uniform": {"share": 0.5}}
    assert found["benchmark"]["apply"] == {"h2o": {"recent": 0.3}}
    assert trial["evaluate"]["apply"] == H2O  # what is written stays


def test_a_field_is_set_before_the_parameters_of_what_it_names() -> None:
    trial: dict[str, Any] = {"evaluate": {"of": "base"}, "benchmark": {"of": "base"}}
    found = placed(trial, {"snapkv.window": 4, "apply": {"snapkv": {}}, "evaluate.tokens": 5})
    assert found["evaluate"] == {"of": "base", "apply": {"snapkv": {"window": 4}}, "tokens": 5}
    assert found["benchmark"] == {"of": "base", "apply": {"snapkv": {"window": 4}}}
    with pytest.raises(KvlabError, match="the trial has no 'h2o'"):
        placed(trial, {"h2o.recent": 0.3})


def test_parameters_exist_where_their_method_is_chosen() -> None:
    trial = {"evaluate": {"of": "base"}}
    written = {
        "h2o.recent": None,
        "uniform.share": {"float": [0.1, 0.5]},
        "apply": [{"h2o": {}, "uniform": {}}, {"snapkv": {}, "uniform": {}}, "full_attention"],
    }
    found = {one.path: one.when for one in dimensions(trial, written)}
    assert found == {
        "apply": None,
        "h2o.recent": ("apply", frozenset({0})),
        "uniform.share": ("apply", frozenset({0, 1})),
    }


def test_what_is_searched_by_itself_is_what_the_yaml_leaves_open() -> None:
    trial = {"evaluate": {"of": "base", "apply": {"h2o": {}, "uniform": {"share": 0.5}}}}
    assert [one.path for one in dimensions(trial, "auto")] == ["h2o.recent"]


def test_corners_show_every_choice_and_both_ends() -> None:
    space = Space(
        [
            Dimension("apply", "categorical", choices=("a", "b")),
            Dimension("m", "int", 1, 9),
            Dimension("n", "int", 2, 4, when=("apply", frozenset({1}))),
        ]
    )
    found = list(corners(space))
    assert {point["apply"] for point in found} == {"a", "b"}
    assert {point["m"] for point in found} == {1, 9}
    assert {point.get("n") for point in found} >= {2, 4}


YAML = """
version: 1
name: tried
seeds: [0, 1]
model: {width: 32, layers: 2, heads: 2}
data: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}
jobs:
  base: {train: {method: full_attention, tokens: 1k}}
  best:
    search:
      trial:
        uptrain: {from: base, method: {block_transformer: {}}, tokens: 1k}
        evaluate: {}
        benchmark: {prompt: 16, generate: 8, batch: [2]}
      space: {block_transformer.block_length: [2, 4, 8, 3]}
      objectives: [perplexity]
      constraints: {perplexity: "<= 2 * base"}
"""


def trials_of(text: str) -> Trials:
    """What makes the trials of the search `best` of a workflow."""
    cells = {cell.name: cell for cell in load_graph(text).cells}
    parents: dict[str, Parent] = {}
    for cell in cells.values():
        above = {role: parents[name] for role, name in cell.parents.items()}
        parents[cell.name] = Parent(cell.name, cell.kind, cell.spec, above)
    identities = {name: cell.identity for name, cell in cells.items()}
    return Trials("best", cells["best"].spec, parents, identities)


@pytest.fixture(scope="module")
def trials() -> Trials:
    return trials_of(YAML)


def test_a_trial_has_its_jobs_for_every_seed_and_builds_on_its_own(trials: Trials) -> None:
    cells = {cell.name: cell for cell in trials.cells(7, {"block_transformer.block_length": 4})}
    assert list(cells) == [
        f"best/7/{kind}[seed={seed}]"
        for seed in (0, 1)
        for kind in ("uptrain", "evaluate", "benchmark")
    ]
    for seed in (0, 1):
        own = f"best/7/uptrain[seed={seed}]"
        assert cells[own].parents == {"from": f"base[seed={seed}]", "data": "data"}
        assert cells[f"best/7/evaluate[seed={seed}]"].parents == {"of": own, "data": "data"}
    again = trials.cells(8, {"block_transformer.block_length": 4})
    assert [cell.identity for cell in again] == [cell.identity for cell in cells.values()]
    other = trials.cells(7, {"block_transformer.block_length": 2})
    assert not {cell.identity for cell in other} & {cell.identity for cell in cells.values()}


def test_what_stands_beside_the_search_counts_for_its_trials() -> None:
    text = YAML.replace(
        "  best:\n", "  best:\n    resources: {cpus: 2}\n    retries: 4\n    timeout: 60\n"
    )
    trials = trials_of(text)
    found = trials.cells(0, {"block_transformer.block_length": 4})
    assert {(cell.resources.cpus, cell.timeout) for cell in found} == {(2, 60.0)}
    assert {count for cell in found for count in cell.retries.values()} == {4}
    assert [cell.resources.exclusive for cell in found] == [False, False, True] * 2
    plain = next(cell for cell in load_graph(YAML).cells if cell.name == "best")
    assert not {"retries", "timeout", "machine", "folder"} & plain.parts.keys()


def test_all_trials_and_the_baseline_are_scored_from_the_same_token(trials: Trials) -> None:
    cells = [
        *trials.baseline(),
        *trials.cells(0, {"block_transformer.block_length": 2}),
        *trials.cells(1, {"block_transformer.block_length": 8}),
    ]
    assert {cell.spec["first_target"] for cell in cells if cell.kind == "evaluate"} == {8}
    assert [cell.name for cell in trials.baseline()][:2] == [
        "best/baseline/evaluate[seed=0]",
        "best/baseline/benchmark[seed=0]",
    ]


def test_a_point_that_cannot_be_says_why(trials: Trials) -> None:
    assert trials.problem({"block_transformer.block_length": 8}) is None
    said = trials.problem({"block_transformer.block_length": 3})
    assert said is not None
    assert "blocks" in said


def test_a_metric_is_the_mean_over_seeds_at_the_largest_batch() -> None:
    def speed(value: float) -> dict[str, Any]:
        rows = [{"batch": b, "kv_bytes_per_token": value * b} for b in (1, 4)]
        return {"rows": rows, "gates": {}}

    jobs = [Done("benchmark", seed, {"batch": [1, 4]}, speed(1.0 + seed)) for seed in (0, 1)]
    jobs.append(Done("noop", 0, {}, {"points": 3, "inner": {"a": 0.5}}))
    found = measured(jobs, ["kv_bytes_per_token", "noop.points", "noop.inner.a", "perplexity"])
    assert {name: one.value for name, one in found.items()} == {
        "kv_bytes_per_token": 6.0, "noop.points": 3.0, "noop.inner.a": 0.5,
    }  # fmt: skip
    assert found["kv_bytes_per_token"].seeds == {"0": 4.0, "1": 8.0}


@pytest.mark.parametrize(
    ("limit", "beyond"),
    [
        ({"metric": "kl", "sign": "<=", "number": 2.0, "of_baseline": False}, -1.0),
        ({"metric": "kl", "sign": ">=", "number": 2.0, "of_baseline": False}, 1.0),
        ({"metric": "kl", "sign": "<=", "number": 2.0, "of_baseline": True}, 1.0 - 6.0),
    ],
    ids=str,
)
def test_how_far_beyond_a_constraint(limit: dict[str, Any], beyond: float) -> None:
    assert excess(limit, {"kl": 1.0}, 3.0) == pytest.approx(beyond)
