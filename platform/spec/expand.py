"""From jobs as written to cells: matrix and seeds expanded, references joined, specs resolved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvlab import KvlabError
from kvlab.platform.graph import Resources
from kvlab.platform.jobs import IMPLICIT, KINDS
from kvlab.platform.jobs.kind import Parent, Settings, Surroundings
from kvlab.platform.jobs.model import model_key
from kvlab.platform.spec.combine import Variant, reference_places, variants, written_at
from kvlab.platform.spec.deferred import DEFERRED, deferred
from kvlab.platform.spec.join import (
    SEED,
    Joined,
    Point,
    TooMany,
    Unmatched,
    explain,
    join,
    partners,
    pinned,
)
from kvlab.platform.spec.matrix import count, label, short_names
from kvlab.platform.spec.order import named, order
from kvlab.platform.spec.workflow import JobEntry, Workflow

OF = "of"
"""The role in which a job names the model that it is about."""
MOST_CELLS = 100_000
MOST_NEEDS = 1_000_000


class _Told(Exception):
    """The job cannot be expanded, and the workflow has been told why."""


@dataclass(slots=True)
class Draft:
    """A cell before it has an identity. `axes` are keyed by dotted path."""

    name: str
    job: JobEntry
    variant: Variant
    axes: Mapping[str, Any]
    parents: dict[str, str]
    needs: tuple[str, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict)
    arms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def resources(self) -> Resources:
        return self.variant.resources

    @property
    def settings(self) -> Settings:
        return self.variant.settings


class Expansion:
    """Expands one workflow. Mistakes go to the workflow; jobs that rest on them are left out."""

    def __init__(
        self, workflow: Workflow, data: Mapping[str, Any], model: Mapping[str, Any]
    ) -> None:
        self.workflow = workflow
        self.data = data
        self.model = model
        self.short: dict[str, str] = {}
        self.drafts: dict[str, list[Draft]] = {}
        self.implicit: Parent | None = None
        self.parents: dict[str, Parent] = {}
        self._searches: dict[str, Callable[[], Parent]] = {}
        self._stand_ins: dict[str, Parent] = {}
        self._deferred: dict[str, set[str]] = {}
        """Cells that wait for searches' winners -> those searches."""
        self._variants: dict[str, list[Variant]] = {}
        self._points: dict[str, list[Point]] = {}
        self._numbers: dict[str, int] = {}
        self._classes: dict[tuple[int, tuple[tuple[str, int], ...]], int] = {}

    def run(self) -> list[Draft]:
        """Return the cells of all sound jobs, parents first."""
        for job in self.workflow.jobs.values():
            if self._few_enough(job):
                self._variants[job.name] = variants(self.workflow, job)
        names = order(self.workflow, self._variants)
        self.short = short_names(self._carried(names))
        self._add_data()
        for name in names:
            job = self.workflow.jobs[name]
            if name in self.workflow.broken or self._rests_on_broken(job):
                self.workflow.broken.add(name)
                continue
            self._cells(job)
        return [draft for drafts in self.drafts.values() for draft in drafts]

    def _carried(self, names: Iterable[str]) -> set[frozenset[str]]:
        """The sets of matrix paths that single cells carry, inherited ones included.

        Args: names: of the jobs, parents before their children.
        """
        carried: dict[str, set[frozenset[str]]] = {}
        for name in names:
            found: set[frozenset[str]] = set()
            for variant in self._variants.get(name, ()):
                sets = {frozenset(self.workflow.jobs[name].matrix)}
                for references in variant.references.values():
                    # A cell has one of them.
                    parents = set().union(*(carried.get(r.job, set()) for r in references))
                    sets = {keys | parent for keys in sets for parent in parents or {frozenset()}}
                found |= sets
            carried[name] = found
        return set().union(*carried.values())

    def _few_enough(self, job: JobEntry) -> bool:
        seeds = job.common.seeds or self.workflow.top.get("seeds") or (0,)
        cells = count(job) * len(seeds)
        if cells > MOST_CELLS:
            self.workflow.blame(job.path, f"would have {cells} cells, more than {MOST_CELLS}")
        return cells <= MOST_CELLS

    def _rests_on_broken(self, job: JobEntry) -> bool:
        wants_model = KINDS[job.kind].produces_model
        if wants_model and not self.model and "model" in self.workflow.document.value:
            return True
        return any(
            name in self.workflow.broken or name not in self.drafts
            for name, *_ in named(job, self._variants)
        )

    def _add_data(self) -> None:
        used = [j for j in self.workflow.jobs.values() if KINDS[j.kind].takes_data(j.raw)]
        settings = self.workflow.top.get("data")
        if not used:
            return
        if settings is None:
            for job in used:
                if "data" not in self.workflow.document.value:
                    message = f"{job.kind} needs text: write `data:` in the workflow"
                    self.workflow.blame((*job.path, job.kind), message)
                self.workflow.broken.add(job.name)
            return
        if not {"fingerprint", "tokenizer"} <= set(self.data):
            self.workflow.broken.update(job.name for job in used)
            return
        around = Surroundings(None, self.model, self.data, {})
        spec = KINDS[IMPLICIT].resolve(settings, around)
        self.implicit = self.parents[IMPLICIT] = Parent(IMPLICIT, IMPLICIT, spec, {})

    def _cells(self, job: JobEntry) -> None:
        drafts: list[Draft] = []
        try:
            for variant in self._variants[job.name]:
                drafts += self._joined(job, variant)
                if len(self.parents) + len(drafts) > MOST_CELLS:
                    raise TooMany
        except TooMany:
            message = f"brings the workflow to more than {MOST_CELLS} cells"
            self.workflow.blame(job.path, message)
            return
        except _Told:
            return
        if KINDS[job.kind].spans_seeds:
            drafts = _spanning(drafts)
        _distinct(drafts)
        if KINDS[job.kind].measured:
            drafts = _alternating(drafts)
        if self._add_needs(job, drafts) and self._resolve(job, drafts):
            self.drafts[job.name] = drafts
            self._points[job.name] = [
                Point(draft.name, {**draft.axes, SEED: arm["seed"]} if arm else draft.axes)
                for draft in drafts
                for arm in draft.arms or ({},)
            ]

    def _joined(self, job: JobEntry, variant: Variant) -> list[Draft]:
        listed = KINDS[job.kind].references
        roles = list(variant.references)
        drafts: list[Draft] = []
        written = [list(reference_places(job, variant, role)) for role in roles]
        for chosen in itertools.product(*written):
            references = dict(zip(roles, chosen, strict=True))
            tags = {
                role: reference.job
                for role, (reference, _) in references.items()
                if listed[role] == "many" and len(variant.references[role]) > 1
            }
            try:
                arms = {
                    role: (
                        reference.job,
                        pinned(role, self._points[reference.job], reference, self.short),
                    )
                    for role, (reference, _) in references.items()
                }
                cells = join(self._own(job, variant, arms), arms, self.short, MOST_CELLS)
            except Unmatched as error:
                self.workflow.blame(references[error.role][1], str(error))
                raise _Told from None
            drafts += [self._draft(job, variant, cell, tags) for cell in self._paired(job, cells)]
        return drafts

    def _paired(self, job: JobEntry, cells: Sequence[Joined]) -> Sequence[Joined]:
        """Give each model what was found of that very model, where that was looked at."""
        for role in KINDS[job.kind].reference_kinds:
            of = f"{role.rpartition('.')[0]}.{OF}".removeprefix(".")
            own = {
                cell.parents[of].name
                for cell in cells
                if {role, of} <= set(cell.parents)
                and self._found_of(cell, role) == cell.parents[of].name
            }
            cells = [
                cell
                for cell in cells
                if of not in cell.parents
                or cell.parents[of].name not in own
                or self._found_of(cell, role) == cell.parents[of].name
            ]
        return cells

    def _found_of(self, cell: Joined, role: str) -> str | None:
        """The model that a cell's parent in this role is about."""
        parent = self.parents[cell.parents[role].name].parents.get(OF)
        return parent.name if parent else None

    def _own(
        self, job: JobEntry, variant: Variant, arms: Mapping[str, tuple[str, Sequence[Point]]]
    ) -> list[dict[str, Any]]:
        """A job's own points. Seeds come from its parents unless it says its own."""
        values = dict(variant.combination.values)
        seeds = job.common.seeds
        if seeds is None:
            if any(SEED in point.axes for _, points in arms.values() for point in points[:1]):
                return [values]
            seeds = self.workflow.top.get("seeds") or (0,)
        return [{**values, SEED: seed} for seed in seeds]

    def _draft(
        self, job: JobEntry, variant: Variant, cell: Joined, tags: Mapping[str, str]
    ) -> Draft:
        axes = {**{k: v for k, v in cell.axes.items() if k != SEED}, SEED: cell.axes.get(SEED)}
        shown = [f"{self.short[key]}={label(v)}" for key, v in axes.items() if key != SEED]
        shown += [f"{role}={name}" for role, name in tags.items()]
        shown.append(f"{SEED}={axes[SEED]}")
        parents = {role: point.name for role, point in cell.parents.items()}
        if KINDS[job.kind].takes_data(job.raw):
            parents[IMPLICIT] = IMPLICIT
        return Draft(f"{job.name}[{','.join(shown)}]", job, variant, axes, parents)

    def _add_needs(self, job: JobEntry, drafts: Sequence[Draft]) -> bool:
        edges = 0
        for index, name in enumerate(job.common.needs):
            find = partners(self._points[name])
            for draft in drafts:
                found = find(draft.axes)
                if not found:
                    message = explain(draft.axes, name, self._points[name], self.short)
                    self.workflow.blame((*job.path, "needs", index), message)
                    return False
                edges += len(found)
                if edges > MOST_NEEDS:
                    message = f"joins more than {MOST_NEEDS} pairs of cells: they share no axis"
                    self.workflow.blame((*job.path, "needs"), message)
                    return False
                draft.needs = tuple(dict.fromkeys((*draft.needs, *(p.name for p in found))))
        return True

    def _resolve(self, job: JobEntry, drafts: Sequence[Draft]) -> bool:
        """Fill in specs. Checks run once per matrix point: seeds change nothing they look at."""
        kind = KINDS[job.kind]
        checked: set[int] = set()
        sound = True
        siblings: dict[str, tuple[Parent, ...]] | None = None
        for draft in drafts:
            try:
                siblings = self._siblings(drafts) if siblings is None else siblings
                parents = {
                    role: self._standing(job.kind, role, name)
                    for role, name in draft.parents.items()
                }
                around = Surroundings(
                    draft.axes[SEED], self.model, self.data, parents, siblings, draft.resources
                )
                point = self._point(draft)
                if point not in checked:
                    checked.add(point)
                    sound &= self._check(job, draft, around)
                draft.spec = kind.resolve(draft.settings, around)
                if draft.arms:
                    draft.spec["arms"] = draft.arms
                    self._searches[draft.name] = partial(
                        kind.stand_in, draft.name, draft.spec, parents
                    )
                if searches := self._awaited(draft, siblings):
                    if kind.inline:
                        raise KvlabError(
                            "a search cannot build on another's winner: name a model that is there"
                        )
                    self._deferred[draft.name] = searches
                    draft.needs = tuple(dict.fromkeys((*draft.needs, *sorted(searches))))
                    draft.spec[DEFERRED] = deferred(draft.variant.combination.raw, around)
            except KvlabError as error:
                self.workflow.blame((*job.path, job.kind), str(error))
                return False
            self.parents[draft.name] = Parent(draft.name, job.kind, draft.spec, parents)
        return sound

    def _standing(self, kind: str, role: str, name: str) -> Parent:
        """A parent as a child sees it: of a search a model such as it may find."""
        if name not in self._searches or _as_it_is(kind, role):
            return self.parents[name]
        if name not in self._stand_ins:
            self._stand_ins[name] = self._searches[name]()
        return self._stand_ins[name]

    def _awaited(self, draft: Draft, siblings: Mapping[str, Sequence[Parent]]) -> set[str]:
        """The searches whose winners decide what a cell is."""
        kind = draft.job.kind
        above = {name for role, name in draft.parents.items() if not _as_it_is(kind, role)}
        above |= {one.name for all_ in siblings.values() for one in all_}
        found = above & self._stand_ins.keys()
        return found.union(*(self._deferred.get(name, ()) for name in above))

    def _point(self, draft: Draft) -> int:
        """A number that cells share when they, and all above them, differ in seeds alone."""
        above = sorted((role, self._numbers.get(name, 0)) for role, name in draft.parents.items())
        key = (id(draft.variant), tuple(above))
        number = self._numbers[draft.name] = self._classes.setdefault(key, len(self._classes) + 1)
        return number

    def _check(self, job: JobEntry, draft: Draft, around: Surroundings) -> bool:
        problems = list(KINDS[job.kind].check(draft.settings, around))
        for inside, message in problems:
            path = (job.kind, *inside.split("."))
            self.workflow.blame(written_at(job, draft.variant.combination, path), message)
        return not problems

    def _siblings(self, drafts: Sequence[Draft]) -> dict[str, tuple[Parent, ...]]:
        """One parent of every distinct model that the whole job refers to, by role."""
        distinct: dict[str, dict[str, Parent]] = {}
        seen: set[tuple[str, str]] = set()
        for draft in drafts:
            for role, name in draft.parents.items():
                parent = self._standing(draft.job.kind, role, name)
                if KINDS[parent.kind].produces_model and (role, name) not in seen:
                    seen.add((role, name))
                    distinct.setdefault(role, {}).setdefault(model_key(parent), parent)
        return {role: tuple(parents.values()) for role, parents in distinct.items()}


def _as_it_is(kind: str, role: str) -> bool:
    """Whether a search in this role is meant itself, not its winner."""
    wanted = KINDS[kind].reference_kinds.get(role)
    return wanted is not None and KINDS[wanted].inline


def _alternating(drafts: Sequence[Draft]) -> list[Draft]:
    """All arms of a seed before the next seed: a slow spell of the machine then hits every arm."""
    seeds = list(dict.fromkeys(draft.axes[SEED] for draft in drafts))
    return sorted(drafts, key=lambda draft: seeds.index(draft.axes[SEED]))


def _spanning(drafts: Sequence[Draft]) -> list[Draft]:
    """One draft for all seeds, which builds on what each of them builds on."""
    found: dict[str, Draft] = {}
    for draft in drafts:
        seed = draft.axes[SEED]
        own = {role: name for role, name in draft.parents.items() if role != IMPLICIT}
        axes = {key: value for key, value in draft.axes.items() if key != SEED}
        first = found.setdefault(label(axes), draft)
        first.arms.append({"seed": seed, "parents": own})
        first.needs = tuple(dict.fromkeys((*first.needs, *own.values())))
    for draft in found.values():
        draft.name = draft.name.replace(f"{SEED}={draft.axes[SEED]}]", "]").replace("[]", "")
        draft.name = draft.name.replace(",]", "]")
    return list(found.values())


def _distinct(drafts: Sequence[Draft]) -> None:
    """Number the cells whose values look alike once they are shortened for a name."""
    seen: dict[str, int] = {}
    for draft in drafts:
        times = seen[draft.name] = seen.get(draft.name, 0) + 1
        if times > 1:
            draft.name = f"{draft.name[:-1]},again={times}]"
