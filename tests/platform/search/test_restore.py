"""A controller was killed: its study goes on from the rows, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvlab import KvlabError
from kvlab.platform.search.broker import Broker
from kvlab.platform.search.rows import Direction, Row
from kvlab.platform.search.space import Dimension, Space

TWO: dict[str, Direction] = {"loss": "minimize", "speed": "maximize"}
SMALL = Space([Dimension("m", "int", 1, 4), Dimension("bits", "categorical", choices=(2, 4))])
NUMBERS = Space([Dimension("x", "float", 0.0, 1.0), Dimension("m", "int", 1, 64)])


def measured(values: Any) -> dict[str, float]:
    x = values.get("x", 0.5)
    return {"loss": (x - 0.4) ** 2 + 1 / values["m"], "speed": 1 + x}


def state(broker: Broker) -> tuple[Any, ...]:
    return (
        broker.rows(),
        [row.number for row in broker.front()],
        sorted(
            (str(trial.params), trial.state.name, str(trial.values), str(trial.constraints))
            for trial in broker.study.trials
            if trial.state.is_finished()
        ),
    )


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "qmc", "grid"])
def test_a_killed_broker_goes_on_from_its_rows(sampler: str, make: Callable[..., Broker]) -> None:
    space = SMALL if sampler == "grid" else NUMBERS
    trials = 8 if sampler == "grid" else 16
    first = make(space, TWO, trials, sampler=sampler, ahead=0, constraints=("c",))
    held = []
    for number in range(7):
        point = first.ask()
        assert point is not None
        if number in (1, 5):
            held.append(point)
        elif number == 2:
            first.tell(point.number, state="pruned")
        elif number == 3:
            first.tell(point.number, state="failed")
        else:
            first.tell(point.number, measured(point.values), {"c": point.values["m"] - 60.0})
    first.close()
    killed = first.rows()

    again = make(space, TWO, trials, sampler=sampler, ahead=0, constraints=("c",))
    again.restore(killed)
    assert state(again) == state(first)
    assert [again.ask(), again.ask()] == held
    late = killed[1]
    assert again.tell(late.number, measured(late.values), {"c": 0.0})
    assert not again.tell(killed[0].number, {"loss": 0.0, "speed": 0.0}, {"c": 0.0})
    handed = []
    while (point := again.ask()) is not None:
        handed.append(point)
        again.tell(point.number, measured(point.values), {"c": 0.0})
    again.tell(held[1].number, measured(held[1].values), {"c": 0.0})
    ran = [row for row in again.rows() if row.source != "repeat"]
    assert len(ran) == trials
    assert len({space.key(row.values) for row in ran}) == trials
    assert min(point.number for point in handed) > max(row.number for row in killed)
    assert all(row.state != "running" for row in again.rows())
    # A sampler that drew its first points again would find them known.
    assert not again.repeats()


def test_a_result_that_comes_before_its_point_is_asked_for_again(
    make: Callable[..., Broker],
) -> None:
    broker = make(NUMBERS, trials=2)
    broker.restore([Row(0, {"x": 0.5, "m": 3}), Row(1, {"x": 0.6, "m": 3})])
    assert broker.tell(0, {"loss": 1.0})
    point = broker.ask()
    assert point is not None
    assert point.number == 1
    broker.tell(1, {"loss": 1.0})
    assert broker.ask() is None


def test_what_cannot_be_restored_is_refused(make: Callable[..., Broker]) -> None:
    row = Row(3, {"x": 0.5, "m": 65}, "complete", {"loss": 1.0})
    with pytest.raises(KvlabError, match=r"^m: must be int from 1 to 64.*\(trial 3 of this study"):
        make(NUMBERS).restore([row])
    with pytest.raises(KvlabError, match="stands twice"):
        make(NUMBERS).restore([row, row])
    broker = make(NUMBERS)
    broker.ask()
    with pytest.raises(KvlabError, match="before its first point"):
        broker.restore([])
