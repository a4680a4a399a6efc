"""The exported JSON Schema accepts what validate accepts, and refuses what a schema can see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kvlab.platform.spec.document import parse
from kvlab.platform.spec.schema import DIALECT, schema

WORKFLOWS = sorted((Path(__file__).parents[3] / "workflows").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    exported = schema()
    assert exported["$schema"] == DIALECT
    Draft202012Validator.check_schema(exported)
    return Draft202012Validator(exported)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_our_workflows_follow_it(path: Path, validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(parse(path.read_text()).value)) == []


@pytest.mark.parametrize(
    ("path", "value", "valid"),
    [
        ("version", 2, False),
        ("nmae", "x", False),
        ("name", "../x", False),
        ("seeds", [], False),
        ("data.source", {"text": "a.txt"}, True),
        ("data.source", {"text": "a.txt", "hub": "b"}, False),
        ("data.source", "pyton", False),
        ("jobs.base.train.tokens", "400k", True),
        ("jobs.base.train.tokens", 2e6, True),
        ("jobs.base.train.tokens", "many", False),
        ("jobs.base.train.tokens", True, False),
        ("jobs.base.train.token", 1, False),
        ("jobs.base.noop", {}, False),
        ("jobs.base.retries", 3, True),
        ("jobs.base.retries", {"node_lost": 3}, True),
        ("jobs.base.retries", {"oom": 3}, False),
        ("jobs.base.timeout", "1h30m", True),
        ("jobs.base.matrix", {}, False),
        ("jobs.base.matrix", {"train.tokens": []}, False),
        ("jobs.block.uptrain.from", {"job": "base", "where": {"seed": 0}}, True),
        ("jobs.block.uptrain.from", {"jib": "base"}, False),
        ("jobs.block.uptrain.method", {"block_transformer": {"block_length": 65}}, False),
        ("jobs.block.uptrain.method", {"block_transformer": None}, True),
        ("jobs.block.uptrain.method", {"sliding_window": {"window": 3}}, False),
        ("jobs.block.uptrain.method", {"cross_layer": {"layers": [0, 0, 2, 2]}}, True),
        ("jobs.block.uptrain.method", {"cross_layer": {"layers": "0s_0_2_2", "window": 8}}, True),
        ("jobs.block.uptrain.method", {"cross_layer": {"layers": 3}}, False),
        ("jobs.block.uptrain.method", {"cross_layer": {"layout": "pizza_tp"}}, False),
        ("jobs.block.uptrain.method", {"prefill": {"passes": 3}}, False),
        ("jobs.quality.evaluate.apply", {"prefill": {"passes": 3}}, True),
        ("jobs.quality.evaluate.apply", {"sliding_window": {"window": 3}}, True),
        ("jobs.quality.evaluate.apply", {"sliding_window": {"window": 0}}, False),
        ("jobs.speed.benchmark.kv_budget", "512MiB", True),
        ("jobs.speed.benchmark.kv_budget", "512 apples", False),
    ],
)
def test_it_sees_what_a_schema_can_see(
    path: str, value: Any, valid: bool, good: str, validator: Draft202012Validator
) -> None:
    workflow = parse(good).value
    holder = workflow
    *above, last = path.split(".")
    for key in above:
        holder = holder[key]
    holder[last] = value
    assert validator.is_valid(workflow) is valid


def test_a_matrix_may_supply_what_is_required(good: str, validator: Draft202012Validator) -> None:
    workflow = parse(good).value
    del workflow["jobs"]["base"]["train"]["tokens"]
    assert not validator.is_valid(workflow)
    workflow["jobs"]["base"]["matrix"] = {"train.tokens": ["1k", "2k"]}
    assert validator.is_valid(workflow)
