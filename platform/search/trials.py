"""From a point of a study's space to the cells of one trial. No matrix, no joins: seeds alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from kvlab import KvlabError
from kvlab.db.states import Cause
from kvlab.platform.graph import Cell, Resources
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.kind import Parent, Surroundings
from kvlab.platform.jobs.model import model_key
from kvlab.platform.jobs.reference import OWN
from kvlab.platform.search.described import corners, space_of
from kvlab.platform.search.space import Space
from kvlab.platform.search.values import METHODS, placed
from kvlab.platform.spec.contents import Contents
from kvlab.platform.spec.identity import identity_of
from kvlab.platform.spec.problems import from_pydantic

BASELINE = "baseline"
"""The trial of the model that constraints are set against, and the role in which it is named."""


FROM = "from"
"""The role in which an earlier study is named."""
CONFIRM = "confirm"
"""The trial that measures the winner again, on seeds that the study has not seen."""


class Trials:
    """Makes the cells of one study's trials.

    Args:
        name: of the study's cell. spec: see `Search.resolve`.
        outside: every cell that a trial builds on, by name. identities: theirs.
    """

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        outside: Mapping[str, Parent],
        identities: dict[str, str] | None = None,
    ) -> None:
        self.name, self._spec, self._outside = name, spec, outside
        self._identities = identities
        contents = Contents(None, write=False)
        self._data = {**spec["data"], "folder": spec["folder"], "contents": contents}
        # Models such as trials are about, all over the space: they are scored on common text.
        self._models: tuple[Parent, ...] = ()
        self._models = tuple(self._met())

    def code(self) -> tuple[list[str], list[str]]:
        """The sources and the libraries that decide what trials find, all over the space."""
        sources: set[str] = set()
        libraries: set[str] = set()
        for values in ({}, *corners(Space(space_of(self._spec)))):
            with suppress(KvlabError):
                trial = placed(self._spec["trial"], values)
                for cell in self._made("", trial, self._spec["arms"][:1]):
                    sources |= set(KINDS[cell.kind].sources(cell.spec))
                    libraries |= set(KINDS[cell.kind].libraries(cell.spec))
        return sorted(sources), sorted(libraries)

    def problem(self, values: Mapping[str, Any]) -> str | None:
        """Say why there can be no trial of these values; None: there can."""
        try:
            self._made(
                "", placed(self._spec["trial"], values), self._spec["arms"][:1], checked=True
            )
        except KvlabError as error:
            return str(error)
        return None

    def cells(self, number: int, values: Mapping[str, Any]) -> list[Cell]:
        """Return the jobs of a trial, parents first, for every seed.

        Raises:
            KvlabError: there can be no such trial.
        """
        return self._made(str(number), placed(self._spec["trial"], values), self._spec["arms"])

    def again(self, values: Mapping[str, Any]) -> list[Cell]:
        """Return the jobs of a trial on seeds that the study has not seen."""
        arms = self._spec["arms"]
        first = max(arm["seed"] or 0 for arm in arms) + 1
        count = fresh_seeds(self._spec)
        fresh = [{**arms[n % len(arms)], "seed": first + n} for n in range(count)]
        return self._made(CONFIRM, placed(self._spec["trial"], values), fresh)

    def model(self, number: str, values: Mapping[str, Any], arm: Mapping[str, Any]) -> Parent:
        """The model that a trial is about: one that it makes, or the one that it names.

        Raises:
            KvlabError: there is none, or no such trial.
        """
        made: dict[str, Parent] = {}
        trial = placed(self._spec["trial"], values)
        for kind in ordered(trial):
            self._cell(number, kind, trial[kind], arm, made, checked=False)
        makers = [kind for kind in made if KINDS[kind].produces_model]
        if makers:
            return made[makers[-1]]
        for role, name in arm["parents"].items():
            if role.endswith(".of"):
                return self._outside[name]
        raise KvlabError("the search's trials are about no model: it has no best one")

    def methods(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The `method` and the `apply` that a trial's last jobs with one have."""
        trial = placed(self._spec["trial"], values)
        found: dict[str, Any] = {}
        for field in METHODS:
            written = [trial[kind][field] for kind in ordered(trial) if field in trial[kind]]
            found |= {field: written[-1]} if written else {}
        return found

    def jobs(self, values: Mapping[str, Any]) -> dict[str, Parent]:
        """The jobs of a trial's first seed by kind, without a number of the trial in their names.

        Raises:
            KvlabError: there can be no such trial.
        """
        made: dict[str, Parent] = {}
        trial = placed(self._spec["trial"], values)
        for kind in ordered(trial):
            self._cell("", kind, trial[kind], self._spec["arms"][0], made, checked=False)
        return made

    def predicted(self, values: Mapping[str, Any]) -> dict[str, float]:
        """What is known of a trial before it runs, by metric: of its first seed."""
        found: dict[str, float] = {}
        for kind, job in self.jobs(values).items():
            own = KINDS[kind].predict(job.spec, job.parents)
            found |= {
                metric: float(value)
                for metric, value in (
                    ("kv_bytes_per_token", own.kv_bytes_per_token),
                    ("parameters", own.parameters),
                    ("body_parameters", own.body_parameters),
                    ("train_flops", own.flops if KINDS[kind].produces_model else None),
                )
                if value is not None
            }
        return found

    @property
    def has_baseline(self) -> bool:
        """Whether constraints are set against another model."""
        return BASELINE in self._spec["arms"][0]["parents"]

    def baseline(self) -> list[Cell]:
        """Return the jobs that measure the baseline as a trial is measured."""
        trial = {
            kind: {k: v for k, v in raw.items() if k not in ("apply", *KINDS[kind].reference_kinds)}
            for kind, raw in self._spec["trial"].items()
            if not KINDS[kind].produces_model and "of" in KINDS[kind].references
        }
        arms = [
            {
                "seed": arm["seed"],
                "parents": {f"{kind}.of": arm["parents"][BASELINE] for kind in trial},
            }
            for arm in self._spec["arms"]
        ]
        return self._made(BASELINE, trial, arms)

    def _met(self) -> Iterator[Parent]:
        """Yield a model of each kind that a trial can be about."""
        found: dict[str, Parent] = {}
        for values in corners(Space(space_of(self._spec))):
            with suppress(KvlabError):
                model = self.model("", values, self._spec["arms"][0])
                found.setdefault(model_key(model), model)
        yield from found.values()

    def _made(
        self,
        trial: str,
        written: Mapping[str, Any],
        arms: Sequence[Mapping[str, Any]],
        *,
        checked: bool = False,
    ) -> list[Cell]:
        cells: list[Cell] = []
        for arm in arms:
            made: dict[str, Parent] = {}
            for kind in ordered(written):
                cells.append(self._cell(trial, kind, written[kind], arm, made, checked))
        return cells

    def _cell(
        self,
        trial: str,
        name: str,
        raw: Mapping[str, Any],
        arm: Mapping[str, Any],
        made: dict[str, Parent],
        checked: bool,
    ) -> Cell:
        """Resolve one job of a trial; `made` are those before it, by kind, and takes it."""
        kind, seed = KINDS[name], arm["seed"]
        resources = self._resources(name)
        try:
            settings = kind.settings.model_validate(raw)
        except ValidationError as error:
            place, message = next(iter(from_pydantic(error, raw, kind.settings)))
            raise KvlabError(f"{'.'.join((name, *map(str, place)))}: {message}") from None
        parents = dict(self._parents(name, raw, arm, made))
        around = Surroundings(
            seed,
            self._spec["model"],
            self._data,
            parents,
            {
                role: (parent, *(self._models if KINDS[parent.kind].produces_model else ()))
                for role, parent in parents.items()
            },
            resources,
        )
        if checked:
            for path, message in kind.check(settings, around):
                raise KvlabError(f"{name}.{path}: {message}")
        spec = kind.resolve(settings, around)
        job = f"{self.name}/{trial}/{name}"
        cell = f"{job}[seed={seed}]"
        made[name] = Parent(cell, name, spec, parents)
        identity, parts = self._identify(name, spec, parents, resources)
        if self._identities is not None:
            self._identities[cell] = identity
        return Cell(
            name=cell,
            job=job,
            kind=name,
            spec=spec,
            axes={"seed": seed},
            parents={role: parent.name for role, parent in parents.items()},
            needs=(),
            identity=identity,
            parts=parts,
            resources=resources,
            retries={Cause(cause): n for cause, n in self._spec.get("retries", {}).items()},
            timeout=self._spec.get("timeout"),
        )

    def _resources(self, name: str) -> Resources:
        """What a job of a trial gets: what the search asks for, as far as its kind can use it."""
        kind, asked = KINDS[name], dict(self._spec["resources"])
        if not kind.gang:
            asked.pop("workers", None)
        return replace(kind.resources, **{**asked, "exclusive": kind.resources.exclusive})

    def _parents(
        self, name: str, raw: Mapping[str, Any], arm: Mapping[str, Any], made: Mapping[str, Parent]
    ) -> Iterator[tuple[str, Parent]]:
        kind = KINDS[name]
        for role in kind.references:
            outer = arm["parents"].get(f"{name}.{role}")
            if outer is not None:
                yield role, self._outside[outer]
            elif raw.get(role) == OWN:
                wanted = kind.reference_kinds.get(role)
                able = [one for one in made if KINDS[one].produces_model]
                yield role, made[wanted or able[-1]]
        if kind.needs_data:
            yield IMPLICIT, self._outside[IMPLICIT]

    def _identify(
        self,
        name: str,
        spec: Mapping[str, Any],
        parents: Mapping[str, Parent],
        resources: Resources,
    ) -> tuple[str, dict[str, str]]:
        if self._identities is None:
            return "", {}
        above = {role: self._identities[parent.name] for role, parent in parents.items()}
        return identity_of(name, spec, above, resources, self._spec["machine"])


def fresh_seeds(spec: Mapping[str, Any]) -> int:
    """On how many seeds the winner runs again: as many for each seed of the study."""
    seeds = len(spec["arms"])
    return -(-int(spec["confirm"]) // seeds) * seeds


def ordered(trial: Mapping[str, Any]) -> list[str]:
    """The kinds of a trial's jobs, makers before users."""
    return [kind for kind in KINDS if kind in trial]


def text_of(values: Mapping[str, Any]) -> str:
    """A point in words, as a name shows it."""
    return ", ".join(
        f"{path.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}"
        for path, value in values.items()
    )
