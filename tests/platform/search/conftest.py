"""Brokers that are closed however their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from kvlab.platform.search.broker import Broker
from kvlab.platform.search.rows import Direction
from kvlab.platform.search.space import Space

ONE: Mapping[str, Direction] = {"loss": "minimize"}


@pytest.fixture
def make() -> Iterator[Callable[..., Broker]]:
    """Make a broker of one objective and 20 trials, if the test says nothing else."""
    made: list[Broker] = []

    def broker(space: Space, objectives: Any = ONE, trials: int = 20, **named: Any) -> Broker:
        made.append(Broker(space, objectives, trials, **named))
        return made[-1]

    yield broker
    for each in made:
        each.close()
