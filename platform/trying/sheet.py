"""The table of a try: one object that the terminal, the JSON and the report are views of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from kvlab.methods.registry import resolve
from kvlab.platform.serving.demand import Unserved, demand_of, under, usual_block
from kvlab.platform.trying.asked import Asked
from kvlab.platform.trying.choose import marked
from kvlab.platform.trying.figures import Findings
from kvlab.platform.trying.plan import QUALITY, RECALL, SPEED
from kvlab.platform.trying.points import Candidates, Point, by_budget, itemsize_of, percent
from kvlab.platform.trying.row import Row
from kvlab.platform.trying.subject import Subject

SCHEMA = 1
OTHERS = (RECALL, SPEED)
"""Jobs that a point may fail and keep its divergence."""
OVER = 1.1
"""Times its budget that a point may hold before it is said to be over it: rounding, and the row of
the step itself."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one budget; None: those that stand at their own size."""

    budget: float | None
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return "at its own size" if self.budget is None else percent(self.budget)


@dataclass(frozen=True, slots=True)
class Sheet:
    """All rows, by budget, the nearest to the full cache first.

    Attributes:
        memory: bytes of the device that serves. weights: bytes of the model's.
        left_out: what did not fit, a line each.
    """

    subject: Subject
    asked: Asked
    memory: int
    weights: int
    groups: tuple[Group, ...]
    left_out: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for group in self.groups for row in group.rows)

    def best(self) -> list[tuple[Group, Row]]:
        """Each budget's best row."""
        return [(g, row) for g in self.groups for row in g.rows if row.mark == "best"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        asked = asdict(self.asked)
        asked["prompts"] = None if self.asked.prompts is None else str(self.asked.prompts)
        return {
            "schema": SCHEMA,
            "model": {
                "folder": str(self.subject.folder),
                "weights_bytes": self.weights,
                "tokenizer": self.subject.tokenizer,
            },
            "asked": asked,
            "memory_bytes": self.memory,
            "points": [_row(group, row) for group in self.groups for row in group.rows],
            "left_out": list(self.left_out),
        }


def _row(group: Group, row: Row) -> dict[str, Any]:
    raw = asdict(row)
    raw.pop("point")
    about = {
        "label": row.point.label,
        "apply": row.point.written,
        "budget": group.budget,
        "stage": row.point.stage,
    }
    return {**about, **{name: _finite(value) for name, value in raw.items()}}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class Sheets:
    """Makes the sheet of what is known so far.

    Args:
        memory: bytes of the device that serves.
    """

    def __init__(self, subject: Subject, asked: Asked, candidates: Candidates, memory: int) -> None:
        self._subject, self._asked, self._memory = subject, asked, memory
        self._candidates = candidates
        self._weights = subject.weight_bytes(itemsize_of(asked.device))
        self._predicted: dict[str, float] = {}

    def make(
        self, points: Sequence[Point], findings: Findings, left_out: Sequence[str] = ()
    ) -> Sheet:
        """Return the rows of the points that something is known of."""
        full = Point({}, None)
        groups = []
        own = [point for point in points if point.budget is None]
        for budget, members in [(None, own), *by_budget(points).items()]:
            rows = [self._row(point, full, findings) for point in members]
            rows = [row for row in rows if row.divergence is not None or row.failed]
            if budget is not None:
                rows = marked(rows)
            rows.sort(key=_order)
            if rows:
                groups.append(Group(budget, tuple(rows)))
        return Sheet(
            self._subject, self._asked, self._memory, self._weights, tuple(groups), tuple(left_out)
        )

    def _row(self, point: Point, full: Point, findings: Findings) -> Row:
        key = point.key
        speed, reference = findings.speed.get(key), findings.speed.get(full.key)
        expected, whole = self._bytes(point), self._bytes(full)
        measured = speed is not None and reference is not None
        held = speed.kv_bytes if speed is not None else expected
        share = held / reference.kv_bytes if measured and reference else expected / whole
        lacking = [findings.failed[job, key] for job in OTHERS if (job, key) in findings.failed]
        return Row(
            point=point,
            divergence=findings.divergence.get(key),
            recall=findings.recall.get(key),
            speed=speed,
            kv_bytes=held,
            predicted=speed is None,
            of_full=share,
            over=point.budget is not None and share > OVER * point.budget,
            sequences=self._fitting(held),
            served=self._served(point),
            failed=findings.failed.get((QUALITY, key), ""),
            lacking=lacking[0] if lacking else "",
        )

    def _bytes(self, point: Point) -> float:
        if point.key not in self._predicted:
            self._predicted[point.key] = self._candidates.bytes(point.written)
        return self._predicted[point.key]

    def _served(self, point: Point) -> int | None:
        """Requests that vLLM's pool holds; see `kvlab.platform.serving.demand`."""
        subject, asked = self._subject, self._asked
        room, apply = self._memory - self._weights, resolve(point.written).to_dict()
        try:
            demand = demand_of(
                subject.config,
                subject.trained,
                apply,
                itemsize=itemsize_of(asked.device),
                block_size=usual_block(under(subject.trained, apply), asked.device),
                in_flight=asked.length,
            )
        except Unserved:
            return None
        return max(0, demand.requests(room, asked.prompt, asked.length))

    def _fitting(self, held: float) -> int | None:
        room = self._memory - self._weights
        return None if room < 0 else int(room // held)


def _order(row: Row) -> tuple[bool, bool, bool, float]:
    """The full cache first; within the budget before over it; by divergence; what failed last."""
    far = float("inf") if row.divergence is None else row.divergence.kl
    return bool(row.point.written), bool(row.failed), row.over, far
