"""How many trials a search takes on a recorded response surface, beside Optuna's own samplers.

The surface is `surface.json`: every point of `workflows/surface.yaml`, measured whole and cheaply.

python -m kvlab.platform.bench.surface FILE    records the newest such workflow of this home
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.db.store import Store
from kvlab.platform.bench.line import Line, middle
from kvlab.platform.compare.studies import REFERENCE
from kvlab.platform.home import Home
from kvlab.platform.search.broker import Broker
from kvlab.platform.search.described import space_of
from kvlab.platform.search.promotion import promoted
from kvlab.platform.search.quality import hypervolume, normalised
from kvlab.platform.search.rows import Direction, losses
from kvlab.platform.search.space import Space, Values

FILE = Path(__file__).with_name("surface.json")
SHARE = 0.95
SEEDS = 20
MOST = 200
"""Trials after which a search is given up."""
CHEAP = 0.125
"""What a cheap trial costs of a whole one: an eighth of the text."""
CHEAP_TRIALS = 64
PROMOTED = 16
OPTUNA = {"random": "RandomSampler", "TPE": "TPESampler", "NSGA-II": "NSGAIISampler"}
PAPERS: tuple[Values, ...] = (
    {"apply": {"h2o": {}, "uniform": {}}, "uniform.tokens": 64, "h2o.recent": 0.5},
    {"apply": {"snapkv": {}, "uniform": {}}, "uniform.tokens": 64, "snapkv.window": 16},
    {
        "apply": {"h2o": {}, "squeeze_attention": {}},
        "squeeze_attention.tokens": 64, "squeeze_attention.p": 0.3, "h2o.recent": 0.5,
    },
)  # fmt: skip
"""Their settings, as near as the grid has them; 64 rows."""


@dataclass(frozen=True)
class Surface:
    """Attributes:
    space: what was measured, all of it.
    objectives: directions by metric. whole, cheap: key of a point -> its numbers.
    """

    space: Space
    objectives: Mapping[str, Direction]
    whole: Mapping[str, Mapping[str, float]]
    cheap: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, file: Path = FILE) -> Surface:
        """Return what was recorded."""
        raw = json.loads(file.read_text())
        space = Space(space_of(raw))
        whole = {space.key(point["values"]): point["whole"] for point in raw["points"]}
        cheap = {space.key(point["values"]): point["cheap"] for point in raw["points"]}
        return cls(space, raw["objectives"], whole, cheap)

    def measure(self, values: Values) -> Mapping[str, float]:
        """What a whole trial finds."""
        return self.whole[self.space.key(values)]

    def estimate(self, values: Values) -> Mapping[str, float]:
        """What a cheap one does."""
        return self.cheap[self.space.key(values)]

    @cached_property
    def _box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        points = [losses(numbers, self.objectives) for numbers in self.whole.values()]
        columns = list(zip(*points, strict=True))
        return tuple(map(min, columns)), tuple(map(max, columns))

    def volume(self, numbers: Sequence[Mapping[str, float]]) -> float:
        """The hypervolume of so many points, in the box of the surface."""
        points = [losses(one, self.objectives) for one in numbers]
        scaled = normalised(points, *self._box) if points else ()
        return hypervolume(scaled, (REFERENCE,) * len(self.objectives))

    @cached_property
    def goal(self) -> float:
        """The hypervolume that ends a search."""
        return SHARE * self.volume(list(self.whole.values()))


@dataclass
class Search:
    """A search under way: what it has cost, and whether it is there."""

    surface: Surface
    cost: float = 0.0
    found: list[Mapping[str, float]] = field(default_factory=list)

    def take(self, values: Values) -> Mapping[str, float]:
        """Run a whole trial."""
        numbers = self.surface.measure(values)
        self.cost += 1
        if numbers not in self.found:
            self.found.append(numbers)
        return numbers

    @property
    def over(self) -> bool:
        """Whether it has reached the goal, or has cost too much."""
        return self.cost >= MOST or self.surface.volume(self.found) >= self.surface.goal


def run() -> list[Line]:
    """Medians over seeds of the trials to 95 % of the best hypervolume."""
    surface = Surface.read()
    named: dict[str, Callable[[Surface, int], float]] = {
        "TPE": ours,
        "TPE from the papers' settings": started,
        f"TPE from {CHEAP_TRIALS} cheap trials": from_cheap,
    }
    mine = {
        name: [search(surface, seed) for seed in range(SEEDS)] for name, search in named.items()
    }
    others = {name: [optuna_s(name, surface, seed) for seed in range(SEEDS)] for name in OPTUNA}
    return [
        Line(
            f"trials to {SHARE:.0%} of the best hypervolume, {name}".replace("%", " %"),
            "trials",
            middle(costs),
            middle(theirs),
            beside=f"Optuna's {other}",
            better="less",
            detail={"ours": costs, "theirs": theirs, "given_up_at": MOST, "seeds": SEEDS},
        )
        for name, costs in mine.items()
        for other, theirs in others.items()
    ]


def ours(surface: Surface, seed: int) -> float:
    """The cost of a study of ours."""
    return _whole(Search(surface), seed).cost


def started(surface: Surface, seed: int) -> float:
    """The same, the papers' settings tried first."""
    return _whole(Search(surface), seed, PAPERS).cost


def from_cheap(surface: Surface, seed: int) -> float:
    """The same, after a study of cheap trials whose best are promoted."""
    trials: list[dict[str, Any]] = []
    with Broker(
        surface.space, surface.objectives, CHEAP_TRIALS, sampler="tpe", seed=seed
    ) as broker:
        while (point := broker.ask()) is not None:
            broker.tell(point.number, surface.estimate(dict(point.values)))
        trials = [asdict(row) for row in broker.rows()]
    first = promoted(trials, surface.objectives, surface.space, PROMOTED)
    # Other points than the cheap ones: as a study that goes on from another one draws them.
    return _whole(Search(surface, CHEAP * CHEAP_TRIALS), seed + SEEDS, first).cost


def _whole(search: Search, seed: int, first: Sequence[Values] = ()) -> Search:
    surface = search.surface
    with Broker(surface.space, surface.objectives, MOST, seed=seed) as broker:
        for values in first:
            broker.enqueue(values)
        while not search.over and (point := broker.ask()) is not None:
            broker.tell(point.number, search.take(dict(point.values)))
    return search


def optuna_s(name: str, surface: Surface, seed: int) -> float:
    """The cost of a plain study of Optuna: a point that it proposes again is run again."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = getattr(optuna.samplers, OPTUNA[name])(seed=seed)
    study = optuna.create_study(directions=list(surface.objectives.values()), sampler=sampler)
    search = Search(surface)
    while not search.over:
        trial = study.ask()
        numbers = search.take(surface.space.suggest(trial))
        study.tell(trial, [numbers[metric] for metric in surface.objectives])
    return search.cost


def record(store: Store) -> dict[str, Any]:
    """Return what the newest workflow of that name measured, as `Surface.read` wants it.

    Raises:
        KvlabError: there is none, or a point lacks.
    """
    rows = [row for row in store.workflows() if row.name == "surface"]
    if not rows:
        raise KvlabError("no workflow 'surface': kvlab run workflows/surface.yaml")
    jobs = {row.name: row for row in store.load(max(row.id for row in rows)).jobs}
    whole, cheap = (jobs[name] for name in ("whole", "cheap"))
    if whole.result is None or cheap.result is None:
        raise KvlabError("workflow 'surface' is not done: kvlab resume surface")
    space = Space(space_of(whole.spec))
    estimates = dict(_measured(cheap.result, space))
    points = []
    for key, numbers in _measured(whole.result, space):
        if key not in estimates:
            raise KvlabError(f"point {key} was not measured cheaply")
        # Bytes are counted, not estimated: a cheap trial would count the same.
        found = {**numbers, **estimates[key]}
        points.append({"values": json.loads(key), "whole": numbers, "cheap": found})
    return {
        "objectives": whole.spec["objectives"],
        "space": whole.spec["space"],
        "points": points,
    }


def _measured(result: Mapping[str, Any], space: Space) -> Iterator[tuple[str, dict[str, float]]]:
    for trial in result["trials"]:
        if trial["state"] == "complete" and trial["source"] != "repeat":
            yield space.key(trial["values"]), dict(trial["objectives"])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record(Store.open(Home.find().url))) + "\n")
