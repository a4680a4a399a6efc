"""What is worth a closer look, and what was best: by divergence, within intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvlab.platform.compare.statistics import paired
from kvlab.platform.trying.figures import Divergence
from kvlab.platform.trying.points import Point
from kvlab.platform.trying.row import Mark, Row

BEST_EVICTIONS = 2
"""Evictions that compositions are made of, at each budget."""
DETAILED, QUICK_DETAILED = 4, 2
"""Points of a budget whose recall and speed are measured."""


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Rows whose divergence is known: within their budget first, the nearest to the full first."""
    known = [row for row in rows if row.divergence is not None]
    return sorted(known, key=lambda row: (row.over, _kl(row)))


def best_evictions(rows: Iterable[Row]) -> dict[float, list[str]]:
    """Return for each budget the evictions that did best, in order."""
    best: dict[float, list[str]] = {}
    for row in ranked(row for row in rows if row.point.budget is not None):
        budget, eviction = row.point.budget, row.point.eviction
        assert budget is not None
        names = best.setdefault(budget, [])
        if eviction is not None and eviction not in names and len(names) < BEST_EVICTIONS:
            names.append(eviction)
    return dict(sorted(best.items()))


def worth_it(rows: Sequence[Row], quick: bool) -> list[Point]:
    """The points to measure in full: the full cache, what has no budget, and each budget's best.

    Among a budget's best is the best single eviction, whatever compositions are before it.
    """
    most = QUICK_DETAILED if quick else DETAILED
    chosen = [row.point for row in rows if row.point.budget is None and row.divergence is not None]
    for budget in sorted({row.point.budget for row in rows if row.point.budget is not None}):
        order = ranked(row for row in rows if row.point.budget == budget)
        first = order[:most]
        single = next((row for row in order if row.point.stage == "single"), None)
        if single is not None and single not in first:
            first = [*first[:-1], single]
        chosen += [row.point for row in first]
    return chosen


def marked(rows: Sequence[Row]) -> list[Row]:
    """Mark among a budget's rows the nearest to the full cache, and those it is not told from.

    Only rows that keep within the budget take part, where there are any. Two are told apart where
    the 95 % interval of their paired differences over the prompts leaves zero out.
    """
    order = ranked(rows)
    best = order[0] if order else None
    marks: dict[str, Mark] = {}
    if best is not None:
        for row in order[1:]:
            if row.over == best.over and not _apart(best.divergence, row.divergence):
                marks[row.point.key] = "tied"
        marks[best.point.key] = "best"
    return [replace(row, mark=marks.get(row.point.key, "")) for row in rows]


def _apart(first: Divergence | None, second: Divergence | None) -> bool:
    if first is None or second is None:
        return True
    if len(first.each) != len(second.each) or len(first.each) < 2:
        return first.kl != second.kl
    differences = [a - b for a, b in zip(first.each, second.each, strict=True)]
    if max(differences) == min(differences):
        return differences[0] != 0
    return paired(differences).distinguished


def _kl(row: Row) -> float:
    return float("inf") if row.divergence is None else row.divergence.kl
