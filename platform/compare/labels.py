"""What an arm is called, its method in words, and lists of names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvlab import KvlabError
from kvlab.methods.axis import Value
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.registry import REGISTRY, from_dict

Canonical = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""`Method.to_dict()`: {axis: {name: {parameter: value}}}; empty is full attention."""

FULL = "full attention"


def axes_text(axes: Mapping[str, Any]) -> str:
    """`block_length=2, rank=8`, without the seed."""
    return ", ".join(f"{key}={plain(value)}" for key, value in axes.items() if key != "seed")


def arm_name(job: str, axes: Mapping[str, Any], apply: str) -> str:
    """The name of an arm: its job, its matrix values, and what is applied where it is used."""
    inside = axes_text(axes)
    name = f"{job}[{inside}]" if inside else job
    return f"{name} + {apply}" if apply else name


Parameter = tuple[str, str]
"""(name of a choice, name of one of its parameters)."""


def method_text(method: Canonical, varying: Iterable[Parameter] = ()) -> str:
    """A canonical method in words: each choice with the parameters that are not its defaults.

    Args:
        method: canonical form.
        varying: parameters that differ between the arms shown: named even where they are defaults.
    """
    named = set(varying)
    parts = [
        _choice(name, parameters, named)
        for choices in method.values()
        for name, parameters in choices.items()
    ]
    return " + ".join(filter(None, parts))


def with_its_budget(method: Canonical) -> Canonical:
    """The method with the default budget written out where its eviction reads one.

    A canonical method leaves it out, and an arm at the default share would not say at which it is.
    """
    try:
        made = from_dict(method)
    except KvlabError:
        return method
    reads = "budget" in made["eviction"].value.consumes and least_rows(made)
    if "budget" in method or not reads:
        return method
    budget = made["budget"]
    return {"budget": {budget.value.name: asdict(budget.params)}, **method}


def varying_parameters(methods: Iterable[Canonical]) -> set[Parameter]:
    """The parameters that do not have one value in all methods that make the same choice."""
    seen: dict[Parameter, set[str]] = {}
    for method in methods:
        for choices in method.values():
            for name, parameters in choices.items():
                for key, value in parameters.items():
                    seen.setdefault((name, key), set()).add(canonical(value))
    return {parameter for parameter, values in seen.items() if len(values) > 1}


def plain(value: Any) -> str:
    """A JSON value as a person writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def canonical(value: Any) -> str:
    """One text per JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by their reason."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _choice(name: str, parameters: Mapping[str, Any], varying: set[Parameter]) -> str:
    defaults = _defaults(name)
    shown = {
        key: value
        for key, value in parameters.items()
        if (name, key) in varying
        or key not in defaults
        or (value is not None and canonical(defaults[key]) != canonical(value))
    }
    inside = ", ".join(f"{key}={plain(value)}" for key, value in shown.items())
    if not inside and _is_default(name):
        return ""
    return f"{name}({inside})" if inside else name


def _is_default(name: str) -> bool:
    """Whether an axis is this where nothing is chosen on it: alone, it says nothing."""
    try:
        entry = REGISTRY.find(name)
    except KvlabError:
        return False
    return isinstance(entry, Value) and entry.default


def _defaults(name: str) -> dict[str, Any]:
    """A method's default parameters; none for a method this installation does not know."""
    try:
        entry = REGISTRY.find(name)
    except KvlabError:
        return {}
    return asdict(entry.params()) if isinstance(entry, Value) else {}
