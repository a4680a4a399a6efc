"""Where the values of a point go in the jobs of a trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from kvlab import KvlabError
from kvlab.methods.registry import REGISTRY
from kvlab.platform.jobs import KINDS

METHODS = ("method", "apply")
"""Fields of a job that hold a method."""


def placed(trial: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the jobs of a trial with the values of a point in their places.

    Args:
        trial: kind -> what is written under it.
        values: `KIND.FIELD...` sets that field; `apply` or `method` alone that of every job that
            has one; `VALUE.PARAM` the parameter of a method's value, wherever the trial names it.
            Fields first: they may name the value.

    Raises:
        KvlabError: a path that leads nowhere.
    """
    made = deepcopy(dict(trial))
    for path, value in sorted(values.items(), key=lambda one: not of_field(one[0], trial)):
        head, *rest = path.split(".")
        if path in METHODS:
            for kind, raw in made.items():
                if path in KINDS[kind].settings.model_fields:
                    raw[path] = deepcopy(value)
        elif of_field(path, trial):
            field: Any = made[head]
            for part in rest[:-1]:
                field = field.setdefault(part, {})
                if not isinstance(field, dict):
                    raise KvlabError(f"{path}: '{part}' is no mapping in the trial")
            field[rest[-1]] = deepcopy(value)
        else:
            _set(made, path, head, rest, value)
    return made


def of_field(path: str, trial: Mapping[str, Any]) -> bool:
    """Whether a path names a field of jobs, and no parameter of a method."""
    return path in METHODS or path.split(".")[0] in trial


def named(written: Any) -> Iterator[str]:
    """Yield the names in a method as it is written."""
    if isinstance(written, str):
        yield written
    elif isinstance(written, Mapping):
        yield from map(str, written)


def method_names(trial: Mapping[str, Any]) -> list[str]:
    """The names in all methods of a trial, in order."""
    found = (
        name
        for raw in trial.values()
        for field in METHODS
        for name in named((raw or {}).get(field))
    )
    return list(dict.fromkeys(found))


def _set(made: dict[str, Any], path: str, name: str, rest: list[str], value: Any) -> None:
    places = 0
    for raw in made.values():
        for field in METHODS:
            if name not in named(raw.get(field)):
                continue
            if isinstance(raw[field], str):
                raw[field] = {raw[field]: {}}
            raw[field][name] = {**(raw[field][name] or {}), ".".join(rest): value}
            places += 1
    if not places:
        known = ", ".join((*made, *method_names(made)))
        raise KvlabError(
            f"{path}: the trial has no '{name}': begin with a job or a method of it ({known})"
        )


def values_of(name: str) -> bool:
    """Whether a name is a value of an axis, whose parameters can be searched."""
    return name in REGISTRY.names() and hasattr(REGISTRY.find(name), "params")
