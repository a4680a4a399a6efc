"""Dimensions as methods declare them, and as a YAML writes them. No Optuna, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kvlab import KvlabError
from kvlab.methods.axis import Range, Value
from kvlab.methods.registry import REGISTRY
from kvlab.platform.search.space import Dimension, Kind, whole

FORMS = (
    "a list of values, {float: [low, high]} or {int: [low, high]}, where `log` or a step may "
    "follow high"
)


def searchable(value_name: str) -> tuple[str, ...]:
    """Return the parameters of an axis value that declare what they may be.

    Raises:
        KvlabError: no such value.
    """
    value = _value(value_name)
    hints = get_type_hints(value.params, include_extras=True)
    return tuple(f.name for f in fields(value.params) if _dimension("", hints[f.name]) is not None)


def declared(value_name: str, param: str) -> Dimension:
    """Return the dimension that a parameter of an axis value declares.

    A number's `Range`, the options of a Literal, false and true. None, where a parameter may be
    None, is left out: it turns something off or on by itself, and a list can name it.

    Raises:
        KvlabError: no such value, or a parameter that declares nothing, with the names that do.
    """
    known = searchable(value_name)
    path = f"{value_name}.{param}"
    if param not in known:
        raise KvlabError(
            f"{path}: '{value_name}' declares no range of that name; it has: "
            f"{', '.join(known) or 'none'}"
        )
    found = _dimension(path, get_type_hints(_value(value_name).params, include_extras=True)[param])
    assert found is not None
    return found


def parse(path: str, given: Any, allowed: Dimension | None = None) -> Dimension:
    """Return the dimension that a space in a YAML says.

    Args:
        path: of the parameter.
        given: None for `allowed` as it is; a list of values; `{float: [low, high]}` or `{int: ...}`
            whose high `log` or a step may follow; a step may also stand beside it as `step:`.
        allowed: what the parameter declares; None where it declares nothing.

    Raises:
        KvlabError: one line that begins with the path.
    """
    if given is None:
        if allowed is None:
            raise KvlabError(f"{path}: declares no range: give {FORMS}")
        return replace(allowed, path=path)
    if isinstance(given, list | tuple):
        dimension = Dimension(path, "categorical", choices=tuple(given))
    elif isinstance(given, Mapping):
        dimension = _range(path, given, allowed)
    else:
        raise KvlabError(f"{path}: must be {FORMS}, found {given!r}")
    if allowed is not None:
        for problem in _beyond(dimension, allowed):
            raise KvlabError(f"{path}: {problem}")
    return dimension


def _range(path: str, given: Mapping[str, Any], allowed: Dimension | None) -> Dimension:
    kinds: list[Kind] = [kind for kind in ("float", "int") if kind in given]
    if len(kinds) != 1 or set(given) - {*kinds, "step"}:
        raise KvlabError(f"{path}: must be {FORMS}, found {dict(given)}")
    (kind,) = kinds
    numbers = given[kind]
    if not isinstance(numbers, list | tuple) or len(numbers) not in (2, 3):
        raise KvlabError(
            f"{path}: {kind} must be [low, high], which log or a step may follow, found {numbers!r}"
        )
    low, high, *rest = numbers
    log = rest == ["log"]
    steps = [*([] if log else rest), *([given["step"]] if "step" in given else [])]
    if len(steps) > 1:
        raise KvlabError(f"{path}: the step is given twice, as {steps[0]!r} and as {steps[1]!r}")
    numeric, named = (int, "whole numbers") if kind == "int" else ((int, float), "numbers")
    for number in (low, high, *steps):
        if isinstance(number, bool) or not isinstance(number, numeric):
            raise KvlabError(f"{path}: {kind} must be made of {named}, found {number!r}")
    step = steps[0] if steps else None
    if step is None and allowed is not None and allowed.kind == kind == "int":
        step = allowed.step
    return Dimension(path, kind, low, high, step, log)


def _beyond(dimension: Dimension, allowed: Dimension) -> Iterator[str]:
    """Yield what a dimension has that its parameter may not be."""
    if dimension.kind == "categorical":
        for choice in dimension.choices:
            if choice is not None:
                try:
                    allowed.admit(choice)
                except KvlabError as error:
                    yield str(error).removeprefix(f"{allowed.path}: ")
        return
    if allowed.kind == "categorical":
        options = ", ".join(map(repr, allowed.choices))
        yield f"must be a list out of {options}, found a range"
        return
    if dimension.kind == "float" and allowed.kind == "int":
        yield "is a whole number: must be {int: [low, high]}, found {float: ...}"
        return
    if dimension.low < allowed.low or dimension.high > allowed.high:
        yield (
            f"must lie within {allowed.low:g} to {allowed.high:g}, found {dimension.low:g} to "
            f"{dimension.high:g}"
        )
        return
    if allowed.step is None:
        return
    offset = (dimension.low - allowed.low) / allowed.step
    if not dimension.step or not whole(dimension.step / allowed.step) or not whole(offset):
        yield (
            f"goes from {allowed.low:g} in steps of {allowed.step:g}, found from {dimension.low:g} "
            f"in steps of {dimension.step or 1:g}"
        )


def _dimension(path: str, hint: Any) -> Dimension | None:
    """What a type hint declares, or None."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        limits = next((note for note in notes if isinstance(note, Range)), None)
        if limits is None:
            return _dimension(path, base)
        kind: Kind = "int" if base is int else "float"
        return Dimension(path, kind, limits.low, limits.high, limits.step, limits.log)
    if get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        return _dimension(path, options[0]) if len(options) == 1 else None
    if get_origin(hint) is Literal:
        return Dimension(path, "categorical", choices=get_args(hint))
    if hint is bool:
        return Dimension(path, "categorical", choices=(False, True))
    return None


def _value(name: str) -> Value:
    entry = REGISTRY.find(name)
    if not isinstance(entry, Value):
        raise KvlabError(
            f"{name}: is a preset of several values: name one of them ({', '.join(entry.values)})"
        )
    return entry
