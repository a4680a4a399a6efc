"""What is tried: every value of the run-time axes that fits, compositions at equal memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvlab.methods.axis import Value
from kvlab.methods.registry import REGISTRY, resolve
from kvlab.platform.trying.points import Candidates, Point

Make = Callable[..., Candidates]


def values(axis: str) -> set[str]:
    return {v.name for v in REGISTRY.values(axis) if not v.default}  # type: ignore[arg-type]


def test_every_eviction_stands_at_every_budget_and_every_precision_by_itself(
    candidates: Make,
) -> None:
    made = candidates(0.3, 0.5)
    singles = made.singles()
    lacking = {name for name in values("eviction") if resolve({name: {}}).lacks()}
    assert {line.split()[0] for line in made.left_out} == lacking
    for budget in (0.3, 0.5):
        assert {p.eviction for p in singles if p.budget == budget} == values("eviction") - lacking
    alone = [p for p in singles if p.budget is None]
    assert {name for p in alone for name in p.written} == values("precision")
    assert all(resolve(p.written) for p in singles)
    assert len({p.key for p in singles}) == len(singles)


def test_a_method_from_outside_is_tried_too(
    candidates: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, slots=True)
    class Params:
        pass

    REGISTRY.names()
    found = REGISTRY.find("h2o")
    assert isinstance(found, Value)
    own = Value("eviction", "own", "mine", Params, cost=found.cost, consumes=("budget",))
    monkeypatch.setitem(REGISTRY._values, "own", own)
    points = candidates(0.5).singles()
    assert [p.written for p in points if p.eviction == "own"] == [
        {"own": {}, "uniform": {"share": 0.5}}
    ]


def test_what_needs_more_rows_is_left_out_in_one_line(candidates: Make) -> None:
    made = candidates(0.1, 0.2, 0.5)
    names = {(p.eviction, p.budget) for p in made.singles()}
    assert ("snapkv", 0.5) in names
    assert ("snapkv", 0.1) not in names
    assert "snapkv at 10 %, 20 %: keeps at least 33 of 128 rows" in made.left_out


def test_what_another_job_must_train_is_left_out_in_one_line(candidates: Make) -> None:
    made = candidates(0.3, 0.5)
    assert "adore" not in {p.eviction for p in made.singles()}
    assert made.left_out == (
        "adore at 30 %, 50 %: needs a trained controller (docs/adore.md): give it in a workflow",
    )


def test_compositions_are_made_of_the_evictions_named(candidates: Make) -> None:
    made = candidates(0.3)
    points = made.composed({0.3: ["h2o"]})
    assert {p.eviction for p in points} == {"h2o"}
    budgets = {name for p in points for name in p.written} & values("budget")
    assert {"squeeze_attention", "pyramidkv", "global_topk"} <= budgets
    assert "per_layer" not in budgets  # it has no share: it is a list
    assert all(p.stage == "composed" for p in points)


def test_what_does_not_compose_is_no_point(candidates: Make) -> None:
    points = candidates(0.3).composed({0.3: ["sliding_window"]})
    assert "global_topk" not in {name for p in points for name in p.written}


@pytest.mark.parametrize("eviction", ["h2o", "snapkv"])
def test_a_composition_with_a_precision_takes_the_bytes_of_its_eviction_alone(
    candidates: Make, eviction: str
) -> None:
    made = candidates(0.3)
    (alone,) = [p for p in made.singles() if p.eviction == eviction]
    (point,) = [p for p in made.composed({0.3: [eviction]}) if "int8" in p.written]
    room = made.bytes(alone.written)
    rows = round(point.written["uniform"]["share"] * 128)
    more = {**point.written, "uniform": {"share": (rows + 1.5) / 128}}
    assert made.bytes(point.written) <= room < made.bytes(more)
    assert rows > 0.3 * 128


def test_a_precision_that_fits_the_budget_alone_needs_no_eviction(candidates: Make) -> None:
    points = candidates(0.9).composed({0.9: ["h2o"]})
    assert not [p for p in points if "int8" in p.written]


def test_values_can_be_chosen(candidates: Make) -> None:
    made = candidates(0.3, only=("h2o", "int8"))
    assert [p.label for p in made.singles()] == ["h2o", "int8"]
    assert [p.label for p in made.composed({0.3: ["h2o"]})] == ["h2o + int8"]


def test_labels_leave_out_the_budget_and_its_default() -> None:
    assert Point({}, None).label == "full cache"
    assert Point({"h2o": {}, "uniform": {"share": 0.1}}, 0.1).label == "h2o"
    written = {"h2o": {"recent": 0.2}, "squeeze_attention": {"share": 0.1}}
    assert Point(written, 0.1).label == "h2o (recent 0.2) + squeeze_attention"
    assert Point({}, None).key == Point({"full_attention": {}}, None).key
