"""A job's matrix: every combination of its values, each put into the job's settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvlab.platform.jobs.field import Path
from kvlab.platform.spec.problems import shown
from kvlab.platform.spec.workflow import JobEntry


@dataclass(frozen=True, slots=True)
class Combination:
    """One point of a matrix: its values by dotted path, and the settings with them put in.

    `origins`: dotted path -> where in the matrix the value stands, for messages.
    """

    values: Mapping[str, Any]
    raw: dict[str, Any]
    beside: dict[str, Any]
    origins: Mapping[str, Path]


class Unreachable(Exception):
    """A dotted path (`key`) that leads through something that is not a mapping."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def count(job: JobEntry) -> int:
    """Number of combinations of a job's matrix."""
    return math.prod(len(values) for values in job.matrix.values())


def combinations(job: JobEntry) -> Iterator[Combination]:
    """Yield every combination, the last key varying fastest.

    Raises:
        Unreachable: a key's path leads through a value that is not a mapping.
    """
    keys = list(job.matrix)
    numbered = [list(enumerate(job.matrix[key])) for key in keys]
    for chosen in itertools.product(*numbered):
        tree: dict[str, Any] = {job.kind: job.raw, "resources": {}}
        for key, (_, value) in zip(keys, chosen, strict=True):
            tree = put(tree, key.split("."), value, key)
        yield Combination(
            values={key: value for key, (_, value) in zip(keys, chosen, strict=True)},
            raw=tree[job.kind],
            beside=tree["resources"],
            origins={
                key: (*job.path, "matrix", key, index)
                for key, (index, _) in zip(keys, chosen, strict=True)
            },
        )


def put(tree: Mapping[str, Any], path: Sequence[str], value: Any, whole: str) -> dict[str, Any]:
    """Return `tree` with `value` at `path`, sharing all that does not change."""
    head, *rest = path
    if not rest:
        return {**tree, head: value}
    below = tree.get(head)
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        done = whole[: len(whole) - sum(len(part) + 1 for part in rest)]
        raise Unreachable(whole, f"leads through '{done}', which is {shown(below)}, not a mapping")
    return {**tree, head: put(below, rest, value, whole)}


def short_names(carried: Iterable[Collection[str]]) -> dict[str, str]:
    """Return for every dotted path the shortest ending that tells it apart.

    Args:
        carried: paths that one cell carries together, inherited ones included, for every such set.
            Two that no cell carries together may have one ending.
    """
    rivals: dict[str, set[str]] = {}
    for keys in carried:
        for key in keys:
            rivals.setdefault(key, set()).update(keys)
    return {key: _shortest(key, others - {key}) for key, others in sorted(rivals.items())}


def _shortest(key: str, others: Collection[str]) -> str:
    taken = {ending for other in others for ending in _endings(other)} | RESERVED
    return next((ending for ending in _endings(key) if ending not in taken), key)


RESERVED = frozenset({"seed", "of"})


def _endings(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def label(value: Any) -> str:
    """Return a value as it stands in a cell's name: no spaces, quotes, slashes or brackets."""
    if isinstance(value, Mapping):
        inside = ";".join(
            f"{k}:{label(v)}" if v not in (None, {}) else str(k) for k, v in value.items()
        )
        return _plain(inside)
    if isinstance(value, list | tuple):
        return "+".join(label(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return _plain(str(value))


def _plain(text: str) -> str:
    kept = "".join(c if c.isalnum() or c in "_-.:;+" else "_" for c in text)
    return kept[:80]
