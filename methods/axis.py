"""The axes a method chooses on, their values, presets, and what composes with what.

A method changes one of a few independent things about a decoder's past. Each is an axis; a value of
an axis is a named class with its own parameters; a method is a choice on every axis. Nothing in
here imports torch, so `validate` and `plan` stay instant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvlab import KvlabError

if TYPE_CHECKING:
    from kvlab.methods.decoder.config import DecoderConfig

AxisName = Literal["sharing", "granularity", "eviction", "budget", "precision", "prefill"]
AXES: tuple[AxisName, ...] = (
    "sharing",
    "granularity",
    "eviction",
    "budget",
    "precision",
    "prefill",
)
TRAIN_TIME: frozenset[AxisName] = frozenset({"sharing", "granularity"})
"""Axes that shape the weights; the others are chosen where a model is used (`apply:`)."""
READ_BY: dict[AxisName, AxisName] = {
    "sharing": "granularity",
    "budget": "eviction",
    "precision": "eviction",
    "prefill": "granularity",
}
"""Axes that only act through the value of another, which must list them in `consumes`."""


class MethodError(KvlabError):
    """A method that does not exist, has no such parameter, or does not compose."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values a parameter may take: validation and search spaces are both read from it."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """One choice on an axis, as registered.

    Attributes:
        axis: the axis it is a value of.
        name: unique over all axes and presets; what a YAML says.
        summary: one line for `kvlab methods`.
        params: a frozen dataclass; every field has a default, an annotation and, where it is a
            number, a `Range`.
        implementation: "package.module:attribute", imported where torch may be imported; None where
            the value that reads the axis needs the params alone.
        cost: "package.module" whose functions predict this value's cost without torch; None where
            the sizes of the decoder say it all.
        paper: arXiv identifier.
        default: what the axis is when a method does not choose on it.
        check: (params, config) -> problems that no field's range can say; config may be None. It is
            that of the decoder the axis acts on: see `inner` and `shape`.
        uptrained: params -> params as a model converted from a checkpoint has them.
        convertible: (uptrained params, config, parent) -> what keeps the weights of a decoder of
            sizes `parent` from becoming those of `config`, which is as in `check`.
        span: granularity only: params -> tokens that one position stands for; None: one.
        inner: granularity only: (params, config) -> the decoder that the other axes act on; None:
            the one of config itself.
        shape: sharing only: (params, that decoder) -> the decoder with keys and values shared.
        consumes: the axes of `READ_BY` that this value's implementation reads; a choice on one that
            it does not list is refused.
        composes: (method, config) -> problems with the other choices of the method; config as in
            `check`.
        least: eviction only: params -> rows that every layer must keep for it to mean anything;
            None: one. 0: with these params it does not read the budget.
        grows: eviction only: params -> whether all that comes after a prompt stays; None: no.
        needs: eviction only: params -> the one of them that the folder of another job must still
            fill in: its name is that job's kind. None: nothing lacks.
        scores: eviction only: it gives past tokens scores that layers can compare.
        served: eviction only: params -> how a server with a paged pool keeps it: "paged", every row
            or those of a window; "slots", those that a ranking leaves. None: it cannot.
        observes_all: eviction and budget: what stays depends on every row of every layer of a
            prompt, so that no early exit leaves rows out.
        sources: packages and modules whose files decide the result (part of a job's identity); of
            the cache's, as in `kvlab.methods.cache.sources`.
    """

    axis: AxisName
    name: str
    summary: str
    params: type
    implementation: str | None = None
    cost: str | None = None
    paper: str | None = None
    default: bool = False
    check: Callable[[Any, DecoderConfig | None], Iterable[str]] | None = None
    uptrained: Callable[[Any], Any] | None = None
    convertible: Callable[[Any, DecoderConfig, DecoderConfig], Iterable[str]] | None = None
    span: Callable[[Any], int] | None = None
    inner: Callable[[Any, DecoderConfig], DecoderConfig] | None = None
    shape: Callable[[Any, DecoderConfig], DecoderConfig] | None = None
    consumes: tuple[AxisName, ...] = ()
    composes: Callable[[Method, DecoderConfig | None], Iterable[str]] | None = None
    least: Callable[[Any], int] | None = None
    grows: Callable[[Any], bool] | None = None
    needs: Callable[[Any], str | None] | None = None
    scores: bool = False
    served: Callable[[Any], Literal["paged", "slots"]] | None = None
    observes_all: bool = False
    sources: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Value | Preset], tuple[str]]:
        """Other processes find it by its name: functions without one cannot travel."""
        return _known, (self.name,)

    def load(self) -> Any:
        """Import and return the implementation."""
        if self.implementation is None:
            raise MethodError(f"method '{self.name}' has no implementation of its own")
        module, _, attribute = self.implementation.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _known(name: str) -> Value | Preset:
    from kvlab.methods.registry import REGISTRY

    return REGISTRY.find(name)


@dataclass(frozen=True, slots=True)
class Preset:
    """A named method: values chosen on several axes at once."""

    name: str
    summary: str
    values: Mapping[str, Mapping[str, Any]]
    paper: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One value with its parameters."""

    value: Value
    params: Any

    @property
    def is_default(self) -> bool:
        """Whether it says what the axis is without a choice."""
        return self.value.default and self.params == self.value.params()

    def to_dict(self) -> dict[str, Any]:
        return {self.value.name: asdict(self.params)}


@dataclass(frozen=True, slots=True)
class Method:
    """A choice on every axis. Axes not chosen have their default value."""

    label: str
    choices: Mapping[AxisName, Choice] = field(default_factory=dict)

    def __getitem__(self, axis: AxisName) -> Choice:
        return self.choices[axis]

    def span(self) -> int:
        """Tokens that one position of the method's granularity stands for."""
        choice = self.choices.get("granularity")
        return choice.value.span(choice.params) if choice and choice.value.span else 1

    def inner(self, config: DecoderConfig) -> DecoderConfig:
        """Return the sizes of the decoder that all axes but granularity act on.

        Args:
            config: of the model as a whole.

        Raises:
            KvlabError: sizes that the granularity cannot have.
        """
        choice = self.choices.get("granularity")
        inner = choice.value.inner if choice else None
        return inner(choice.params, config) if choice and inner else config

    def acting(self, config: DecoderConfig) -> DecoderConfig:
        """Return that decoder with its keys and values shared: whose past run-time axes shape.

        Args:
            config: of the model as a whole.

        Raises:
            KvlabError: sizes that the granularity or the sharing cannot have.
        """
        config = self.inner(config)
        choice = self.choices.get("sharing")
        shape = choice.value.shape if choice else None
        return shape(choice.params, config) if choice and shape else config

    def positions(self, tokens: int) -> int:
        """The most positions that so many tokens can take, wherever a prompt among them ends."""
        span = self.span()
        return tokens if span == 1 else -(-tokens // span) + 1

    def lacks(self) -> str | None:
        """What another job must still give the method: see `Value.needs`."""
        choice = self["eviction"]
        return choice.value.needs(choice.params) if choice.value.needs else None

    def uptrained(self) -> Method:
        """Return the method as a model converted from a checkpoint has it."""
        return Method(
            self.label,
            {
                axis: Choice(
                    c.value, c.value.uptrained(c.params) if c.value.uptrained else c.params
                )
                for axis, c in self.choices.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The canonical form that identities hash: non-default choices with every parameter."""
        return {
            axis: choice.to_dict()
            for axis, choice in sorted(self.choices.items())
            if not choice.is_default
        }
