"""One study under way: which trials there are, what came of them, what was found so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from zlib import crc32

from kvlab import KvlabError
from kvlab.platform.graph import Cell
from kvlab.platform.search.broker import Broker
from kvlab.platform.search.described import space_of
from kvlab.platform.search.importance import importances
from kvlab.platform.search.outcome import Done, Measured, excess, limit_text, measured
from kvlab.platform.search.rows import Row
from kvlab.platform.search.space import Space, Values
from kvlab.platform.search.trials import BASELINE, CONFIRM, FROM, Trials, text_of
from kvlab.platform.search.watch import Watch, saving

HOPELESS = 10
"""Trials that all miss a constraint before a person is told."""

Data = Mapping[str, Any]
"""A trial as it is stored: the columns of its `Row`, `measured` and `message`. The baseline and the
winner's confirmation have no row: their `number` is their name."""


class Try(NamedTuple):
    """A trial to be run: its number, its jobs, and what is stored of it."""

    number: str
    cells: Sequence[Cell]
    data: Data


@dataclass(frozen=True, slots=True)
class StudyView:
    """counts: trials per state. leading: the best so far, or the front, in words."""

    name: str
    counts: Mapping[str, int]
    trials: int
    leading: tuple[str, ...]


class Study:
    """Args:
    spec: see `Search.resolve`. trials: makes its trials' jobs.
    past: what is stored of its trials, by number.
    first: points tried first, behind those of the spec; the sampler draws what they lack.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        trials: Trials,
        past: Mapping[str, Data],
        first: Sequence[Values] = (),
    ) -> None:
        self.spec, self.trials = spec, trials
        self._limits = {limit_text(limit): limit for limit in spec["constraints"]}
        metrics = (*spec["objectives"], *(limit["metric"] for limit in spec["constraints"]))
        self._metrics = list(dict.fromkeys(metrics))
        self._told = {number: dict(data) for number, data in past.items()}
        self._first = len(first)
        self.watch = None
        if spec["pruner"] != "none":
            self.watch = Watch(spec["pruner"], spec["objectives"])
        self._warned = False
        self._led: tuple[int, list[Row]] | None = None
        self._base: Mapping[str, Measured] | None = None if self.trials.has_baseline else {}
        self._confirmed = self._told.pop(CONFIRM, None)
        base = self._told.pop(BASELINE, None)
        self._base_begun = base is not None
        if base is not None and base["state"] == "complete":
            self._base = {metric: Measured(**one) for metric, one in base["measured"].items()}
        self._broker = Broker(
            Space(space_of(spec), self.trials.problem),
            spec["objectives"],
            spec["trials"],
            sampler=spec["sampler"],
            seed=_seed(spec),
            ahead=spec["parallel"],
            constraints=list(self._limits),
        )
        if self._told:
            columns = Row.__dataclass_fields__
            self._broker.restore(
                [Row(**{c: data[c] for c in columns}) for data in self._told.values()]
            )
        for point in spec["start"]:  # those that were tried already are left out
            self._broker.enqueue(point)
        for point in first:
            self._broker.enqueue(point, partial=True)
        self._broker.start()

    def next(self, running: set[str]) -> Try | None:
        """Return a trial to be run now, if there is room and the sampler has an answer.

        Args: running: trials whose jobs are not all over.
        """
        if self._base is None and not self._base_begun:
            self._base_begun = True
            data = {"number": BASELINE, "state": "running", "measured": {}}
            return Try(BASELINE, self.trials.baseline(), data)
        while len(running) < self.spec["parallel"] and self._broker.ready:
            point = self._broker.ask()
            if point is None:
                break
            if str(point.number) in running:  # its jobs go on by themselves
                continue
            cells = self.trials.cells(point.number, point.values)
            self.watched(str(point.number))
            return Try(str(point.number), cells, self._store(point.number))
        if self._broker.over and not running and self._to_confirm():
            return self._again()
        return None

    def watched(self, number: str) -> None:
        """Follow a trial's learning curve from now on."""
        if self.watch is not None and number.isdigit():
            row = self._broker.row(int(number))
            self.watch.begin(row.number, self.trials.predicted(row.values))

    def judge(
        self, number: str, jobs: Sequence[Done], failure: str | None, *, pruned: bool = False
    ) -> Data | None:
        """Say what came of a trial whose jobs are over; None: not before the baseline is known.

        Args: jobs: those that are done. failure: why others are not. pruned: it was stopped.

        Raises:
            KvlabError: the baseline was not measured.
        """
        found = measured(jobs, self._metrics)
        wanted = self._metrics
        if number == BASELINE:
            limits = self._limits.values()
            wanted = [limit["metric"] for limit in limits if limit["of_baseline"]]
        lacking = next((name for name in wanted if name not in found), None)
        if failure is None and lacking is not None:
            failure = f"its jobs report no {lacking}"
        shown = {name: one.to_dict() for name, one in found.items()}
        if number == BASELINE:
            if failure is not None:
                raise KvlabError(f"the baseline was not measured: {failure}")
            self._base = found
            return {"number": BASELINE, "state": "complete", "measured": shown}
        if self._base is None:
            return None
        if number == CONFIRM:
            state = "failed" if failure else "complete"
            self._confirmed = {
                **(self._confirmed or {}), "state": state, "measured": shown, "message": failure,
            }  # fmt: skip
            return self._confirmed
        if self.watch is not None:
            self.watch.ended(int(number), complete=failure is None)
        if pruned:
            self._broker.tell(int(number), state="pruned")
        elif failure is not None:
            self._broker.tell(int(number), state="failed")
        else:
            values = {name: one.value for name, one in found.items()}
            beyond = {
                text: excess(limit, values, self._baseline(limit))
                for text, limit in self._limits.items()
            }
            objectives = {name: values[name] for name in self.spec["objectives"]}
            self._broker.tell(int(number), objectives, beyond)
        return self._store(int(number), measured=shown, message=failure)

    def repeats(self) -> list[Data]:
        """Return the trials that were answered from earlier ones since the last call."""
        return [
            self._store(row.number, measured=self._told[str(row.same_as)]["measured"])
            for row in self._broker.repeats()
        ]

    @property
    def over(self) -> bool:
        """Whether there will be no further trial."""
        return self._broker.over and not self._to_confirm()

    def hopeless(self) -> str | None:
        """Say that no trial meets the constraints, once enough of them were tried."""
        complete = sum(
            data["state"] == "complete" and data["source"] != "repeat"
            for data in self._told.values()
        )
        if self._warned or complete < HOPELESS or not self._limits or self._leading():
            return None
        self._warned = True
        return f"none of {HOPELESS} trials meets {', '.join(self._limits)}"

    def result(self) -> dict[str, Any]:
        """What the study found; see docs/search.md.

        Raises:
            KvlabError: no trial was completed.
        """
        rows = [self._told[number] for number in sorted(self._told, key=int)]
        if not any(data["state"] == "complete" for data in rows):
            why = next((data["message"] for data in rows if data.get("message")), "none was begun")
            raise KvlabError(f"no trial was completed: {why}")
        best, space = self._broker.best(), self._broker.space
        return {
            "trials": rows,
            "baseline": {name: one.to_dict() for name, one in (self._base or {}).items()},
            "best": None if best is None else best.number,
            "front": [row.number for row in self._broker.front()],
            "importances": importances(self._broker.rows(), space, self.spec["objectives"]),
            "confirmed": self._confirmed,
            "promoted": self._first if self.spec["promote"] else None,
            "ended": self._broker.ended or None,
            "pruned": None if self.watch is None else self._saving(),
        }

    def _to_confirm(self) -> bool:
        """Whether the winner is yet to be measured again."""
        wanted = self.spec["confirm"] > 0 and self._confirmed is None
        return wanted and self._broker.best() is not None

    def _again(self) -> Try:
        best = self._broker.best()
        assert best is not None
        cells = self.trials.again(best.values)
        self._confirmed = {
            "number": CONFIRM,
            "of": best.number,
            "state": "running",
            "seeds": list(dict.fromkeys(cell.axes["seed"] for cell in cells)),
            "measured": {},
        }
        return Try(CONFIRM, cells, self._confirmed)

    def _saving(self) -> dict[str, Any]:
        assert self.watch is not None
        stopped = [int(n) for n, data in self._told.items() if data["state"] == "pruned"]
        return saving(self.watch.steps, stopped)

    def shown(self, number: str) -> str | None:
        """A trial that is over, in words; None for the baseline."""
        if number == CONFIRM and self._confirmed is not None:
            found = self._confirmed["measured"]
            numbers = ", ".join(f"{name} {one['value']:.4g}" for name, one in found.items())
            said = self._confirmed["message"] or numbers
            return f"trial {self._confirmed['of']} on fresh seeds: {said}"
        if number not in self._told:
            return None
        data = self._told[number]
        if data["state"] != "complete":
            said = f"{text_of(data['values'])}: {data.get('message') or data['state']}"
        else:
            said = _words(data["objectives"], data["values"])
        return f"trial {number}: {said}"

    def view(self) -> StudyView:
        """How it stands, for a person."""
        rows = self._broker.rows()
        return StudyView(
            self.trials.name,
            Counter(row.state for row in rows if row.source != "repeat"),
            self.spec["trials"],
            tuple(
                f"{_words(row.objectives, row.values)} (trial {row.number})"
                for row in self._leading()
            ),
        )

    def _leading(self) -> list[Row]:
        """The best so far, or the front; worked out once for each trial that ends."""
        ended = sum(data["state"] != "running" for data in list(self._told.values()))
        if self._led is None or self._led[0] != ended:
            several = len(self.spec["objectives"]) > 1
            best = None if several else self._broker.best()
            front = self._broker.front() if several else [best] if best is not None else []
            self._led = ended, front
        return self._led[1]

    def close(self) -> None:
        self._broker.close()

    def _store(self, number: int, **beside: Any) -> Data:
        """A trial's row and what is known beside it, as they are stored."""
        data = {"measured": {}, "message": None, **asdict(self._broker.row(number)), **beside}
        self._told[str(number)] = data
        return data

    def _baseline(self, limit: Mapping[str, Any]) -> float | None:
        assert self._base is not None
        return self._base[limit["metric"]].value if limit["of_baseline"] else None


def _seed(spec: Mapping[str, Any]) -> int:
    """The sampler's; a study that goes on from another one draws other points than that did."""
    earlier = spec["arms"][0]["parents"].get(FROM)
    seed: int = spec["seed"]
    return seed if earlier is None else crc32(f"{seed} after {earlier}".encode())


def _words(objectives: Mapping[str, float], values: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in objectives.items())
    return f"{numbers} at {text_of(values)}"
