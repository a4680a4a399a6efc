"""Jobs that build on a search's winner: what they are shows when it is found.

When a workflow is read they are resolved against a model such as the search may find, so that
mistakes are told; then once more against the winner, which gives them their identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvlab import KvlabError
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.kind import Parent, Surroundings
from kvlab.platform.jobs.model import model_key
from kvlab.platform.spec.contents import Contents
from kvlab.platform.spec.identity import Machine, identity_of
from kvlab.platform.spec.problems import from_pydantic

DEFERRED = "deferred"
"""The key of such a job's spec that holds all that resolving it again takes."""


def deferred(raw: Mapping[str, Any], around: Surroundings) -> dict[str, Any]:
    """Return what resolving a job again takes; its parents are found by the names in its row."""
    return {
        "raw": dict(raw),
        "seed": around.seed,
        "model": dict(around.model),
        "data": {key: value for key, value in around.data.items() if key != "contents"},
        "siblings": {role: [one.name for one in all_] for role, all_ in around.siblings.items()},
    }


def settled(
    kind_name: str,
    held: Mapping[str, Any],
    parents: Mapping[str, Parent],
    siblings: Mapping[str, tuple[Parent, ...]],
    identities: Mapping[str, str],
    resources: Resources,
    machine: Machine,
    found: Mapping[str, Any],
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Resolve a deferred job for good.

    Args:
        held: what `deferred` returned. parents, siblings: by role, the winner among them.
        identities: of the parents, by name.
        found: the winner's "method" and "apply", for a job that does not say its own.

    Returns:
        Its spec, its identity and the parts of that.

    Raises:
        KvlabError: it cannot be built on this winner.
    """
    kind = KINDS[kind_name]
    raw = dict(held["raw"])
    for field, value in found.items():
        if field in kind.settings.model_fields:
            raw.setdefault(field, value)
    try:
        settings = kind.settings.model_validate(raw)
    except ValidationError as error:
        place, message = next(iter(from_pydantic(error, raw, kind.settings)))
        raise KvlabError(f"{'.'.join((kind_name, *map(str, place)))}: {message}") from None
    data = {**held["data"], "contents": Contents(None, write=False)}
    around = Surroundings(held["seed"], held["model"], data, parents, distinct(siblings), resources)
    for path, message in kind.check(settings, around):
        raise KvlabError(f"{kind_name}.{path}: {message}")
    spec = kind.resolve(settings, around)
    above = {role: identities[parent.name] for role, parent in parents.items()}
    return spec, *identity_of(kind_name, spec, above, resources, machine)


def distinct(siblings: Mapping[str, tuple[Parent, ...]]) -> dict[str, tuple[Parent, ...]]:
    """One parent of every distinct model, by role."""
    return {
        role: tuple({model_key(one): one for one in parents}.values())
        for role, parents in siblings.items()
        if role != IMPLICIT
    }
