"""The YAML of a try: a workflow as a person would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kvlab.platform.spec.read import load_graph
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.plan import Plan
from kvlab.platform.trying.points import Candidates, Point, key_of
from kvlab.platform.trying.subject import read
from kvlab.platform.trying.text import python_source

FULL = Point({}, None)


@pytest.fixture
def plan(checkpoint: Callable[..., Path]) -> Plan:
    subject = read(checkpoint("a folder: with {signs}"), "tiny")
    asked = Asked((0.1, 0.5), "cpu", 128, 16, 4, 2, 3)
    points = Candidates(subject, 128, 144, asked.budgets, 4).singles()
    points = [FULL, *points]
    return Plan(subject, asked, python_source(576), points, points[:2], points[:3])


def test_its_cells_are_the_points(plan: Plan) -> None:
    cells = load_graph(plan.text(1)).cells
    for job, points in (("quality", plan.quality), ("recall", plan.recall), ("speed", plan.speed)):
        found = [key_of(cell.spec["apply"]) for cell in cells if cell.job == job]
        assert sorted(found) == sorted(point.key for point in points)


def test_it_is_compared_with_the_full_cache_by_what_it_measures(plan: Plan) -> None:
    report = yaml.safe_load(plan.text(1))["report"]
    assert report == {"baseline": "model", "pareto": ["kl", "kv_bytes_per_token"]}


def test_what_a_stage_ran_the_next_has_too(plan: Plan) -> None:
    first = replace(plan, quality=plan.quality[:2], recall=(), speed=())
    cells = {c.name: c.identity for c in load_graph(first.text(1)).cells}
    assert cells.items() <= {c.name: c.identity for c in load_graph(plan.text(1)).cells}.items()


def test_resources_are_written_where_they_are_not_the_usual(plan: Plan) -> None:
    assert "resources:" not in plan.text(1)
    assert {c.resources.cpus for c in load_graph(plan.text(3)).cells if c.job == "recall"} == {3}
    on_gpu = yaml.safe_load(replace(plan, asked=replace(plan.asked, device="cuda")).text(1))
    assert {on_gpu["jobs"][job]["resources"]["gpus"] for job in ("quality", "speed")} == {1}
