"""A method as a YAML writes it: names of presets and axis values, each with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import core_schema

from kvlab import KvlabError
from kvlab.methods.axis import AXES, TRAIN_TIME, AxisName, Choice, Method, Preset, Range, Value
from kvlab.methods.budget.amount import shortfall
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.registry import REGISTRY, MisfitError, misfits, resolve
from kvlab.platform.jobs.field import Path, nested, suggest, wrong

When = Literal["train", "run"]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@cache
def params_model(params: type) -> type[BaseModel]:
    """Return the pydantic model of a params dataclass: its types, ranges and defaults."""
    hints = get_type_hints(params, include_extras=True)
    columns: dict[str, Any] = {}
    for column in fields(params):
        default = column.default
        if default is MISSING and column.default_factory is not MISSING:
            default = column.default_factory()
        columns[column.name] = (_checked(hints[column.name]), Field(default=default))
    model: type[BaseModel] = create_model(params.__name__, __base__=_Params, **columns)
    return model


def _checked(hint: Any) -> Any:
    """Turn every `Annotated[T, Range]` in a type hint into pydantic's bounds."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *notes = get_args(hint)
        checked = _checked(inner)
        for note in notes:
            if isinstance(note, Range):
                integral = inner is int
                low, high = (int(note.low), int(note.high)) if integral else (note.low, note.high)
                checked = Annotated[checked, Field(ge=low, le=high)]
        return checked
    if origin in (Union, UnionType):
        return Union[tuple(_checked(part) for part in get_args(hint))]  # noqa: UP007
    if origin is tuple:
        parts = tuple(part if part is ... else _checked(part) for part in get_args(hint))
        return Annotated[tuple.__class_getitem__(parts), Field(strict=False)]
    return hint


def build(params: type, written: Mapping[str, Any]) -> Any:
    """Make a params dataclass from a mapping, refusing what its types and ranges do not allow.

    Raises:
        pydantic.ValidationError: with locations inside the mapping.
    """
    model = params_model(params).model_validate(written)
    return params(**{name: getattr(model, name) for name in type(model).model_fields})


class MethodField:
    """The annotation of a settings field that holds a Method.

    "train" takes train-time axes only, "run" (`apply:`) run-time axes only.
    """

    def __init__(self, when: When) -> None:
        self.when = when

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            self._parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda method: method.to_dict()
            ),
        )

    def __get_pydantic_json_schema__(self, _core: Any, _handler: Any) -> dict[str, Any]:
        return json_schema(self.when)

    def _parse(self, written: Any) -> Method:
        if isinstance(written, Method):
            return written
        return parse(written, self.when)


def parse(written: Any, when: When) -> Method:
    """Read a method, collecting all mistakes.

    Raises:
        PydanticCustomError: with the path of every mistake below `written`.
    """
    if not isinstance(written, str | Mapping):
        raise wrong("must be a method's name, or a mapping of names to their parameters")
    items: dict[str, Any] = {written: None} if isinstance(written, str) else dict(written)
    problems = [problem for name, raw in items.items() for problem in _entry(name, raw, when)]
    if isinstance(written, str):
        problems = [((), message) for _, message in problems]
    if problems:
        raise nested(problems)
    try:
        return resolve(written, build=build)
    except ValidationError as error:
        first = error.errors()[0]
        raise wrong(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except MisfitError as error:
        if isinstance(written, str) or error.value not in items:
            raise wrong(str(error)) from None
        raise nested([((error.value,), str(error).removeprefix(f"{error.value}: "))]) from None
    except KvlabError as error:
        raise wrong(str(error)) from None


def _entry(name: Any, raw: Any, when: When) -> Iterator[tuple[Path, str]]:
    known = names(when)
    if not isinstance(name, str) or name not in REGISTRY.names():
        yield (name,), f"unknown method: {suggest(name, known)}"
        return
    entry = REGISTRY.find(name)
    misplaced = [value for value in _values(entry) if not _belongs(value, when)]
    if name not in known and misplaced:
        yield (name,), _elsewhere(name, misplaced[0], when)
        return
    if raw is not None and not isinstance(raw, Mapping):
        yield (name,), f"must be a mapping of parameters, found {raw!r}"
        return
    if isinstance(entry, Value):
        yield from _params_problems(entry, raw or {})


def _params_problems(value: Value, raw: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    from kvlab.platform.spec.problems import from_pydantic

    try:
        params = build(value.params, raw)
    except ValidationError as error:
        for path, message in from_pydantic(error, raw, params_model(value.params)):
            yield (value.name, *path), message
        return
    except (KvlabError, ValueError) as error:
        yield (value.name,), str(error)
        return
    if value.check is not None:
        for message in value.check(params, None):
            yield (value.name,), message


def _elsewhere(name: str, value: Value, when: When) -> str:
    if when == "run":
        return (
            f"'{name}' chooses the {value.axis} axis, which is decided when a model is trained: "
            "write it under `method:` of a train or uptrain job"
        )
    return (
        f"'{name}' chooses the {value.axis} axis, which is decided where a model is used: "
        "write it under `apply:` of an evaluate or benchmark job"
    )


def _values(entry: Value | Preset) -> list[Value]:
    if isinstance(entry, Value):
        return [entry]
    found = [REGISTRY.find(name) for name in entry.values]
    return [value for value in found if isinstance(value, Value)]


@cache
def _names(when: When) -> tuple[str, ...]:
    chosen = []
    for name in REGISTRY.names():
        if all(_belongs(value, when) for value in _values(REGISTRY.find(name))):
            chosen.append(name)
    return tuple(chosen)


def _belongs(value: Value, when: When) -> bool:
    """Train-time axes stand under `method:`, others under `apply:`, a default anywhere."""
    return value.default or (value.axis in TRAIN_TIME) == (when == "train")


def names(when: When) -> list[str]:
    """Names that may stand under `method:` ("train") or `apply:` ("run")."""
    return list(_names(when))


def json_schema(when: When) -> dict[str, Any]:
    """JSON Schema of a method: a name, or a mapping of names to parameters."""
    properties: dict[str, Any] = {}
    for name in names(when):
        entry = REGISTRY.find(name)
        own = (
            params_model(entry.params).model_json_schema()
            if isinstance(entry, Value)
            else {"type": "object"}
        )
        own["description"] = entry.summary
        properties[name] = {"anyOf": [own, {"type": "null"}]}
    return {
        "anyOf": [
            {"type": "string", "enum": names(when)},
            {"type": "object", "properties": properties, "additionalProperties": False},
        ]
    }


def compatible(
    method: Method,
    config: DecoderConfig,
    path: str,
    *,
    trained: Method | None = None,
    parent: DecoderConfig | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (path of a value, problem) for what a method's values say against a decoder's sizes.

    Args:
        method: as the model will have it; or run-time axes (`apply:`).
        config: the model's sizes; of its parent where it is converted from one.
        path: where the method is written.
        trained: what a model was trained with that `method` is applied to; None: `method` itself.
        parent: where the model is converted, the sizes of the parent's own decoder.
    """
    told: set[str] = set()
    for place, message in _against(method, config, path, trained, parent):
        if message not in told:
            yield place, message
        told.add(message)


def _against(
    method: Method,
    config: DecoderConfig,
    path: str,
    trained: Method | None,
    parent: DecoderConfig | None,
) -> Iterator[tuple[str, str]]:
    for axis in AXES:
        choice = method.choices.get(axis)
        if choice is None:
            continue
        value, params = choice.value, choice.params
        try:
            sizes = _acted_on(axis, trained or method, config)
        except KvlabError:
            continue  # granularity or sharing itself is told so
        problems = list(value.check(params, sizes)) if value.check is not None else []
        if parent is not None and value.convertible is not None:
            problems += value.convertible(params, sizes, parent)
        for message in problems:
            yield _place(path, choice), message
    try:
        sizes = (trained or method).acting(config)
    except KvlabError:
        return
    made = (trained or method).choices
    whole = {**method.choices, **{axis: made[axis] for axis in TRAIN_TIME if axis in made}}
    for choice, message in misfits(Method(method.label, whole), sizes):
        if method.choices.get(choice.value.axis) is choice:
            yield _place(path, choice), message


def short_of(method: Method, trained: Method, prompt: int, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path of a value, problem) where a share of a prompt is less than an eviction needs.

    Args:
        method: run-time axes. trained: those that the model was trained with.
        prompt: tokens that shares are of.
    """
    span = trained.span()
    problem = shortfall(method, -(-prompt // span), "blocks" if span > 1 else "tokens")
    if problem is not None:
        budget = method["budget"]
        yield _place(path, method["eviction"] if budget.is_default else budget), problem


def _place(path: str, choice: Choice) -> str:
    return path if choice.is_default else f"{path}.{choice.value.name}"


def _acted_on(axis: AxisName, method: Method, config: DecoderConfig) -> DecoderConfig:
    """The sizes of the decoder that an axis of a method acts on."""
    if axis == "granularity":
        return config
    return method.inner(config) if axis == "sharing" else method.acting(config)


class _Memo:
    """Remembers a function of a Method by the object: settings of one variant share theirs."""

    def __init__(self, function: Callable[[Method], Any]) -> None:
        self._function = function
        self._known: dict[int, tuple[Method, Any]] = {}

    def __call__(self, method: Method) -> Any:
        found = self._known.get(id(method))
        if found is None or found[0] is not method:
            if len(self._known) > MOST_REMEMBERED:
                self._known.clear()
            found = self._known[id(method)] = (method, self._function(method))
        return found[1]


MOST_REMEMBERED = 4096
_canonical = _Memo(lambda method: method.to_dict())
_converted = _Memo(lambda method: method.uptrained())


def canonical(method: Method) -> dict[str, Any]:
    """Return `method.to_dict()`; shared between calls, so it must not be changed."""
    found: dict[str, Any] = _canonical(method)
    return found


def uptrained(method: Method) -> Method:
    """Return `method.uptrained()`: the method as a model converted from another has it."""
    found: Method = _converted(method)
    return found


def axis_sources(method: Method, axes: Collection[AxisName] = AXES) -> tuple[str, ...]:
    """Packages whose source files decide what a method's choices on these axes do."""
    chosen = (choice for axis, choice in method.choices.items() if axis in axes)
    return tuple(dict.fromkeys(source for choice in chosen for source in choice.value.sources))
