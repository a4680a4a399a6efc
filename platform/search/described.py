"""From what a YAML says of a space to its dimensions, and from those to JSON and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from itertools import islice, product
from typing import Any

from kvlab import KvlabError
from kvlab.methods.axis import Value
from kvlab.methods.registry import REGISTRY
from kvlab.platform.compare.samples import READERS
from kvlab.platform.jobs import KINDS
from kvlab.platform.jobs.field import suggest
from kvlab.platform.search.ranges import declared, parse, searchable
from kvlab.platform.search.space import Dimension, Space
from kvlab.platform.search.values import METHODS, method_names, named, of_field, values_of

COMPARABLE = ("apply", "dtype")
"""Fields of a job that measures which may differ between trials."""


def dimensions(trial: Mapping[str, Any], written: Any) -> list[Dimension]:
    """Return what a search varies; conditions come from lists of methods.

    Args: trial: kind -> what is written under it. written: the space, or "auto".

    Raises:
        KvlabError: a line that begins with the path below `space`.
    """
    if written == "auto":
        written = {
            f"{name}.{param}": None
            for name in method_names(trial)
            if values_of(name)
            for param in _automatic(name, trial)
        }
    found = []
    for path, given in sorted(written.items(), key=lambda one: not of_field(str(one[0]), trial)):
        head, _, param = str(path).partition(".")
        if of_field(path, trial):
            _check_field(path, trial)
            found.append(parse(path, given))
            continue
        if not values_of(head):
            known = [*trial, *method_names(trial)]
            raise KvlabError(f"{path}: must begin with one of {', '.join(known)}")
        if param not in _parameters(head):
            raise KvlabError(f"{path}: unknown parameter: {suggest(param, _parameters(head))}")
        dimension = parse(path, given, declared(head, param) if param in searchable(head) else None)
        found.append(_conditioned(dimension, head, found, trial))
    return found


def space_of(spec: Mapping[str, Any]) -> list[Dimension]:
    """Return the dimensions of a resolved search."""
    found = []
    for raw in spec["space"]:
        when = raw["when"]
        choices = tuple(raw["choices"])
        when = None if when is None else (when[0], frozenset(when[1]))
        found.append(Dimension(**{**raw, "choices": choices, "when": when}))
    return found


def written_of(dimension: Dimension) -> dict[str, Any]:
    found = asdict(dimension)
    if dimension.when is not None:
        found["when"] = [dimension.when[0], sorted(dimension.when[1])]
    return {**found, "choices": list(dimension.choices)}


def _conditioned(
    dimension: Dimension, name: str, before: list[Dimension], trial: Mapping[str, Any]
) -> Dimension:
    """Let a parameter exist only where its method is chosen."""
    for other in before:
        if other.kind != "categorical" or other.path.rpartition(".")[2] not in METHODS:
            continue
        having = frozenset(i for i, choice in enumerate(other.choices) if name in named(choice))
        if having and len(having) < len(other.choices):
            return replace(dimension, when=(other.path, having))
        if having:
            return dimension
    if name not in method_names(trial):
        raise KvlabError(
            f"{dimension.path}: no method of the trial names '{name}': write it there, such as "
            f"apply: {{{name}: {{}}}}"
        )
    return dimension


def _check_field(path: str, trial: Mapping[str, Any]) -> None:
    """Refuse a field that no job of the trial has, or that decides what is measured."""
    head, _, field = path.partition(".")
    if head in METHODS and not field:
        if not any(head in KINDS[kind].settings.model_fields for kind in trial):
            raise KvlabError(f"{path}: no job of the trial has that field")
        return
    columns = KINDS[head].settings.model_fields
    known = [column.alias or name for name, column in columns.items()]
    if field.partition(".")[0] not in known:
        raise KvlabError(f"{path}: {head} has no such field: {suggest(field, known)}")
    if head in READERS and field.partition(".")[0] not in COMPARABLE:
        raise KvlabError(
            f"{path}: decides what is measured: trials could not be compared (only "
            f"{', '.join(COMPARABLE)} can vary there)"
        )


def _parameters(name: str) -> list[str]:
    value = REGISTRY.find(name)
    assert isinstance(value, Value)
    return [column.name for column in fields(value.params)]


def _automatic(name: str, trial: Mapping[str, Any]) -> Iterator[str]:
    """Parameters that `space: auto` varies: numbers that the YAML leaves at a default."""
    fixed = {
        key
        for raw in trial.values()
        for field in METHODS
        if isinstance(method := (raw or {}).get(field), Mapping)
        for key in (method.get(name) or {})
    }
    value = REGISTRY.find(name)
    assert isinstance(value, Value)
    params = value.params()
    for param in searchable(name):
        default = getattr(params, param)
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if param not in fixed and is_number:
            yield param


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Points that between them have every choice and both ends of every range."""
    first = {one.path: one.choices[0] if one.choices else one.low for one in space.dimensions}
    yield space.admit(first)
    for dimension in space.dimensions:
        for value in dimension.choices[1:] if dimension.choices else (dimension.high,):
            chosen = {**first, dimension.path: value}
            if dimension.when is not None:
                path, indices = dimension.when
                chosen[path] = next(one for one in space.dimensions if one.path == path).choices[
                    min(indices)
                ]
            yield space.admit(chosen)


def samples(space: Space) -> Iterator[dict[str, Any]]:
    """A few points of a space, to see whether any of them can be."""
    yield from corners(space)
    ends = [
        [(one, value) for value in (one.choices or (one.low, one.high))] for one in space.dimensions
    ]
    for chosen in islice(product(*ends), 64):
        yield space.admit({dimension.path: value for dimension, value in chosen})
