"""How a job names the jobs it builds on: `base`, or `{job: base, where: {seed: 0}}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from kvlab.platform.jobs.field import Path, nested, suggest, wrong

BEST = ".best"
"""Ends a reference to a search's winner."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A YAML job, or those of its cells whose axes have the values in `where`.

    An axis named in `where` is pinned: it no longer joins with the referring job's. `best`: what
    is meant is the winner of the search of that name, written `NAME.best`.
    """

    job: str
    where: Mapping[str, Any] = field(default_factory=dict)
    best: bool = False

    @property
    def text(self) -> str:
        """The name as it is written."""
        return self.job + (BEST if self.best else "")


OWN = "."
"""Names, inside a trial of a search, what the trial itself made."""


def parse_one(written: Any) -> Reference:
    """Read one reference."""
    if isinstance(written, Reference):
        return written
    if isinstance(written, str):
        return _named(written, {})
    if not isinstance(written, Mapping):
        raise wrong("must be a job's name, or {job: NAME, where: {AXIS: VALUE}}")
    problems: list[tuple[Path, str]] = [
        ((key,), f"unknown key: {suggest(key, ['job', 'where'])}")
        for key in written
        if key not in ("job", "where")
    ]
    if not isinstance(written.get("job"), str):
        problems.append((("job",), "must be a job's name"))
    where = written.get("where", {})
    if not isinstance(where, Mapping):
        problems.append((("where",), "must map axes to values, such as {seed: 0}"))
    if problems:
        raise nested(problems)
    return _named(written["job"], dict(where))


def _named(name: str, where: dict[str, Any]) -> Reference:
    job = name.removesuffix(BEST)
    if job != name and where:
        raise wrong("a search has a winner for each seed, which joins by itself: leave where out")
    return Reference(job, where, best=job != name)


def parse_many(written: Any) -> tuple[Reference, ...]:
    """Read one reference or a list of them."""
    if isinstance(written, tuple):
        return written
    if not isinstance(written, list):
        return (parse_one(written),)
    if not written:
        raise wrong("must name at least one job")
    return tuple(parse_one(item) for item in written)


_ONE: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"job": {"type": "string"}, "where": {"type": "object"}},
            "required": ["job"],
            "additionalProperties": False,
        },
    ]
}

One = Annotated[
    Reference,
    BeforeValidator(parse_one),
    PlainSerializer(lambda one: {"job": one.text, "where": dict(one.where)}),
    WithJsonSchema(_ONE),
]
Many = Annotated[
    tuple[Reference, ...],
    BeforeValidator(parse_many),
    PlainSerializer(lambda many: [{"job": one.text, "where": dict(one.where)} for one in many]),
    WithJsonSchema({"anyOf": [_ONE, {"type": "array", "items": _ONE, "minItems": 1}]}),
]
