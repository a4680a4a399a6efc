"""The contract of a job kind: a folder with settings.py (light) and run.py (the work)."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from kvlab.platform.graph import Resources

if TYPE_CHECKING:
    from kvlab.platform.jobs.context import Context


class Settings(BaseModel):
    """What a user writes under a kind's key. Subclasses are the YAML's schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a job will cost and what its model holds, before it runs. None: does not apply.

    steps: passes of one token each that wait for one another, where it scores token by token.
    """

    parameters: int | None = None
    body_parameters: int | None = None
    flops: float | None = None
    kv_bytes_per_token: float | None = None
    seconds: float | None = None
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Parent:
    """A referenced cell as a child sees it when it is resolved: its kind, spec and own parents."""

    name: str
    kind: str
    spec: Mapping[str, Any]
    parents: Mapping[str, Parent]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What resolving a cell may look at besides its own settings."""

    seed: int | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    parents: Mapping[str, Parent]
    siblings: Mapping[str, tuple[Parent, ...]] = field(default_factory=dict)
    """role -> a parent of every distinct model that the whole YAML job refers to in that role."""
    resources: Resources = field(default_factory=Resources)


References = Mapping[str, Literal["one", "many"]]


class Kind(ABC):
    """One kind of job. Stateless; one instance is shared.

    Attributes:
        name: the YAML key. settings: the pydantic model of what stands under it.
        references: role -> "one" or "many": fields that name other jobs. A cell has exactly one
            parent per role ("many" is crossed into one cell per parent).
        reference_paths: role -> dotted path of its field, where that is not the role itself.
        reference_kinds: role -> the kind of job it must name; other roles name a model.
        measured: identity includes device, thread count and driver (benchmarks).
        produces_model: its artifact folder can be loaded by `kvlab.methods.store.load`.
        gang: it can run as several workers (`resources: {workers: N}`).
        incidental: spec keys that do not decide the result, so no part of the identity.
        inline: the controller itself does it, out of other jobs; no worker ever has it.
        spans_seeds: its cells of all seeds are one, whose spec lists them as `arms`.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Settings]]
    references: ClassVar[References] = {}
    reference_paths: ClassVar[Mapping[str, str]] = {}
    reference_kinds: ClassVar[Mapping[str, str]] = {}
    needs_data: ClassVar[bool] = False
    measured: ClassVar[bool] = False
    produces_model: ClassVar[bool] = False
    gang: ClassVar[bool] = False
    incidental: ClassVar[frozenset[str]] = frozenset()
    inline: ClassVar[bool] = False
    spans_seeds: ClassVar[bool] = False
    resources: ClassVar[Resources] = Resources()

    def takes_data(self, raw: Mapping[str, Any]) -> bool:
        """Whether a job of this kind, as it is written, needs the workflow's text."""
        return self.needs_data

    @abstractmethod
    def resolve(self, settings: Settings, around: Surroundings) -> dict[str, Any]:
        """Return the cell's spec: JSON, all that `run` needs, defaults filled in.

        Raises:
            KvlabError: what is written cannot be done.
        """

    def check(self, settings: Settings, around: Surroundings) -> Iterable[tuple[str, str]]:
        """Yield (path inside the settings, problem) for what types cannot say."""
        return ()

    @abstractmethod
    def sources(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        """Packages and modules whose source files decide the result."""

    def libraries(self, spec: Mapping[str, Any]) -> tuple[str, ...]:
        """Installed distributions besides torch whose version decides the result."""
        return ()

    def predict(self, spec: Mapping[str, Any], parents: Mapping[str, Parent]) -> Prediction:
        """Predict cost without torch."""
        return Prediction()

    def run(self, spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
        """Do the job; return its result (JSON: see docs/jobs.md)."""
        module = importlib.import_module(f"kvlab.platform.jobs.{self.name}.run")
        result: dict[str, Any] = module.run(spec, context)
        return result
