"""Every value and preset there is, and methods chosen among them by name. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kvlab.methods.axis import (
    AXES,
    READ_BY,
    AxisName,
    Choice,
    Method,
    MethodError,
    Preset,
    Range,
    Value,
)
from kvlab.methods.decoder.config import DecoderConfig

ENTRY_POINTS = "kvlab.methods"
"""Where methods outside this repository register."""


class MisfitError(MethodError):
    """A choice that does not go with the others of its method.

    Attributes: value: its name.
    """

    def __init__(self, value: str, message: str) -> None:
        super().__init__(message)
        self.value = value


class Registry:
    """Every value and preset that is known: ours, then those of installed entry points."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._presets: dict[str, Preset] = {}
        self._loaded = False

    def add(self, entry: Value | Preset) -> None:
        """Register; a name may be taken once."""
        if entry.name in self._values or entry.name in self._presets:
            raise MethodError(f"method name '{entry.name}' is taken")
        if isinstance(entry, Preset):
            self._presets[entry.name] = entry
            return
        if not is_dataclass(entry.params) or any(
            f.default is MISSING and f.default_factory is MISSING for f in fields(entry.params)
        ):
            raise MethodError(f"method '{entry.name}': params must be a dataclass of defaults")
        self._values[entry.name] = entry

    def values(self, axis: AxisName | None = None) -> list[Value]:
        self._load()
        return [v for v in self._values.values() if axis in (None, v.axis)]

    def presets(self) -> list[Preset]:
        self._load()
        return list(self._presets.values())

    def names(self) -> list[str]:
        self._load()
        return sorted({*self._values, *self._presets})

    def find(self, name: str) -> Value | Preset:
        """Return the entry called `name`; raise a MethodError that suggests the nearest names."""
        self._load()
        entry = self._values.get(name) or self._presets.get(name)
        if entry is None:
            close = get_close_matches(name, self.names(), n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise MethodError(f"unknown method '{name}': {hint}known: {', '.join(self.names())}")
        return entry

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        from importlib.metadata import entry_points

        from kvlab.methods import catalog

        for entry in catalog.ENTRIES:
            self.add(entry)
        for point in entry_points(group=ENTRY_POINTS):
            for entry in point.load():
                self.add(entry)


REGISTRY = Registry()


def resolve(
    written: str | Mapping[str, Any],
    *,
    build: Callable[[type, Mapping[str, Any]], Any] | None = None,
) -> Method:
    """Turn what a YAML says into a Method.

    Args:
        written: `full_attention`, or `{block_transformer: {block_length: 4}, int8: {}}`: names of
            presets and values, each with its parameters (a null is an empty mapping).
        build: how a params class is made from a mapping; the platform passes a validating one.

    Raises:
        MethodError: an unknown name, two choices on one axis, or a combination that is refused.
    """
    make = build or build_params
    if not isinstance(written, str | Mapping):
        raise MethodError(f"a method is a name, or names with parameters, found {written!r}")
    items = {written: {}} if isinstance(written, str) else dict(written)
    chosen: dict[AxisName, Choice] = {}
    for name, raw in items.items():
        entry = REGISTRY.find(str(name))
        if not (raw is None or isinstance(raw, Mapping)):
            raise MethodError(f"{name}: must be a mapping of parameters, found {raw!r}")
        if isinstance(entry, Preset):
            own: dict[str, dict[str, Any]] = {n: dict(p) for n, p in entry.values.items()}
            for key, value in (raw or {}).items():
                holder = [n for n in own if key in {f.name for f in fields(_params(n))}]
                if len(holder) != 1:
                    raise MethodError(f"preset '{name}' has no single parameter '{key}'")
                own[holder[0]][key] = value
        else:
            own = {name: dict(raw or {})}
        for value_name, parameters in own.items():
            value = REGISTRY.find(value_name)
            if not isinstance(value, Value):
                raise MethodError(f"preset '{name}' names '{value_name}', which is no axis value")
            if value.axis in chosen:
                other = chosen[value.axis].value.name
                raise MethodError(f"'{value_name}' and '{other}' both choose the {value.axis} axis")
            chosen[value.axis] = Choice(value, make(value.params, parameters))
    label = written if isinstance(written, str) else "+".join(items) or "full_attention"
    for axis in AXES:
        if axis not in chosen:
            default = next((v for v in REGISTRY.values(axis) if v.default), None)
            if default is not None:
                chosen[axis] = Choice(default, default.params())
    method = Method(label, chosen)
    refuse_unread(method)
    refuse_misfits(method)
    return method


def misfits(method: Method, config: DecoderConfig | None = None) -> Iterator[tuple[Choice, str]]:
    """Yield each choice that does not go with the others, and why.

    Args:
        config: of the decoder that run-time axes act on, where it is known.
    """
    for axis, choice in method.choices.items():
        by = READ_BY.get(axis)
        read = by is None or axis in method[by].value.consumes
        if read and choice.value.composes is not None:
            for problem in choice.value.composes(method, config):
                yield choice, problem


def refuse_misfits(method: Method, config: DecoderConfig | None = None) -> None:
    """Raise a MisfitError if choices of the method do not go together; see `misfits`."""
    for choice, problem in misfits(method, config):
        raise MisfitError(choice.value.name, f"{choice.value.name}: {problem}")


def refuse_unread(method: Method) -> None:
    """Raise a MisfitError if the method chooses on an axis that nothing in it reads."""
    for axis, by in READ_BY.items():
        choice, reader = method.choices.get(axis), method[by].value
        if choice and not choice.is_default and axis not in reader.consumes:
            raise MisfitError(
                choice.value.name,
                f"{axis} '{choice.value.name}' would change nothing: {by} '{reader.name}' does not "
                f"read the {axis} axis; leave it out or choose another {by}",
            )


def from_dict(canonical: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Method:
    """The inverse of `Method.to_dict`; {} is full attention.

    Raises:
        MethodError: a name that is unknown, or not a value of the axis it stands under.
    """
    named: dict[str, Mapping[str, Any]] = {}
    for axis, choice in canonical.items():
        for name, parameters in choice.items():
            entry = REGISTRY.find(name)
            if not isinstance(entry, Value) or entry.axis != axis:
                raise MethodError(f"'{name}' is not a value of the {axis} axis")
            named[name] = parameters
    return resolve(named)


def build_params(cls: type, mapping: Mapping[str, Any]) -> Any:
    """Make a params dataclass, refusing unknown names and numbers outside their `Range`.

    Raises:
        MethodError: naming the parameter, what was found and what is allowed.
    """
    hints = get_type_hints(cls, include_extras=True)
    for name, found in mapping.items():
        if name not in hints:
            known = ", ".join(hints) or "none"
            raise MethodError(f"{cls.__name__} has no parameter '{name}'; it has: {known}")
        if allowed := _refusal(hints[name], found):
            raise MethodError(f"{name}: must be {allowed}, found {found!r}")
    return cls(**mapping)


def _refusal(hint: Any, found: object) -> str:
    """What a value of this type must be, or "" if `found` is one."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        limits = next((note for note in notes if isinstance(note, Range)), None)
        refusal = _refusal(base, found)
        if limits is None or (not refusal and limits.low <= found <= limits.high):  # type: ignore[operator]
            return refusal
        return f"{refusal or base.__name__} from {limits.low} to {limits.high}"
    if get_origin(hint) is Literal:
        return "" if found in get_args(hint) else f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        refusals = [_refusal(option, found) for option in get_args(hint)]
        return "" if "" in refusals else " or ".join(refusals)
    if get_origin(hint) is tuple:
        entry = get_args(hint)[0]
        if not isinstance(found, list | tuple):
            return "a list"
        return next((f"a list of {r}" for each in found if (r := _refusal(entry, each))), "")
    if hint is NoneType:
        return "" if found is None else "null"
    if hint in (int, float, bool, str):
        kinds = (int, float) if hint is float else hint
        right = isinstance(found, kinds) and (hint is bool or not isinstance(found, bool))
        return "" if right else str(hint.__name__)
    return ""


def _params(name: str) -> type:
    entry = REGISTRY.find(name)
    assert isinstance(entry, Value)
    return entry.params
