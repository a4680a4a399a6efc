"""References join on shared axes: equal values pair, the rest cross."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlab.platform.jobs.field import suggest
from kvlab.platform.jobs.reference import Reference
from kvlab.platform.spec.problems import shown

SEED = "seed"
PIN = ", or pin the reference: {job: NAME, where: {AXIS: VALUE}}"


@dataclass(frozen=True, slots=True)
class Point:
    """Something with a place on the axes: a cell that may be referred to.

    `axes`: dotted matrix path or `seed` -> value, own and inherited.
    """

    name: str
    axes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Joined:
    """One cell to be: its axes and the parent of each role."""

    axes: dict[str, Any]
    parents: dict[str, Point] = field(default_factory=dict)


class TooMany(Exception):
    """A join would yield more cells than a workflow may have."""


class Unmatched(Exception):
    """A reference (in `role`) that finds no partner; the text says why and what there is."""

    def __init__(self, role: str, message: str) -> None:
        super().__init__(message)
        self.role = role


def pinned(
    role: str, points: Sequence[Point], reference: Reference, short: Mapping[str, str]
) -> list[Point]:
    """Return the points that a reference's `where` keeps, without the axes it names.

    Args:
        role: what the reference is for. points: all cells of the referenced job.
        reference: with a `where` of short or dotted axis names.
        short: dotted axis -> short name.

    Raises:
        Unmatched: an axis the job does not have, or values that no cell has.
    """
    kept = list(points)
    for written, value in reference.where.items():
        axes = {axis for point in points for axis in point.axes}
        names = {name: axis for axis in axes for name in (axis, short.get(axis, axis))}
        if written not in names:
            known = sorted(short.get(axis, axis) for axis in axes)
            raise Unmatched(
                role, f"'{reference.job}' has no axis '{written}': {suggest(written, known)}"
            )
        axis = names[written]
        there = [point for point in kept if _key(point.axes.get(axis)) == _key(value)]
        if not there:
            values = _values(kept, axis)
            said = f"no cell of '{reference.job}' has {written}={shown(value)}: {values}"
            raise Unmatched(role, said)
        kept = [
            Point(point.name, {a: v for a, v in point.axes.items() if a != axis}) for point in there
        ]
    return kept


def join(
    own: Iterable[Mapping[str, Any]],
    roles: Mapping[str, tuple[str, Sequence[Point]]],
    short: Mapping[str, str],
    most: int,
) -> list[Joined]:
    """Return the cells of a job: its own points crossed with the parents that agree with them.

    Args:
        own: the job's own points (matrix keys, and `seed` where it has seeds of its own).
        roles: role -> (name of the job referred to, its cells).
        short: dotted axis -> short name. most: cells there may be.

    Raises:
        Unmatched: one of the job's own points has no partner in a role.
        TooMany: there would be more than `most`.
    """
    cells = [Joined(dict(axes)) for axes in own]
    for role, (job, points) in roles.items():
        find = partners(points)
        grown: list[Joined] = []
        for cell in cells:
            matching = find(cell.axes)
            if not matching:
                raise Unmatched(role, explain(cell.axes, job, points, short) + PIN)
            if len(grown) + len(matching) > most:
                raise TooMany
            grown += [
                Joined({**point.axes, **cell.axes}, {**cell.parents, role: point})
                for point in matching
            ]
        cells = grown
    return cells


def partners(points: Sequence[Point]) -> Callable[[Mapping[str, Any]], list[Point]]:
    """Return a function from axes to the points that agree on every axis both have."""
    groups: dict[frozenset[str], list[Point]] = {}
    for point in points:
        groups.setdefault(frozenset(point.axes), []).append(point)
    indexes: dict[tuple[frozenset[str], frozenset[str]], dict[str, list[Point]]] = {}

    def find(axes: Mapping[str, Any]) -> list[Point]:
        matching: list[Point] = []
        for names, members in groups.items():
            shared = names.intersection(axes)
            index = indexes.get((names, shared))
            if index is None:
                index = indexes[names, shared] = {}
                for member in members:
                    index.setdefault(_at(member.axes, shared), []).append(member)
            matching += index.get(_at(axes, shared), [])
        return matching

    return find


def _at(axes: Mapping[str, Any], names: frozenset[str]) -> str:
    return _key([axes[name] for name in sorted(names)]) if names else ""


_key = json.JSONEncoder(sort_keys=True).encode


def explain(
    axes: Mapping[str, Any], job: str, points: Sequence[Point], short: Mapping[str, str]
) -> str:
    """Return why no cell of a job agrees with these axes."""
    there = {axis for point in points for axis in point.axes}
    shared = sorted(there & axes.keys())
    at = ", ".join(f"{short.get(axis, axis)}={shown(axes[axis])}" for axis in shared)
    values = "; ".join(_values(points, axis, short.get(axis, axis)) for axis in shared)
    return f"no cell of '{job}' has {at}: {values}; give both jobs the same values"


def _values(points: Sequence[Point], axis: str, name: str = "") -> str:
    distinct = {_key(p.axes[axis]): p.axes[axis] for p in points if axis in p.axes}
    listed = ", ".join(shown(value) for value in list(distinct.values())[:8])
    more = ", ..." if len(distinct) > 8 else ""
    return f"it has {name or axis.split('.')[-1]} {listed}{more}"
