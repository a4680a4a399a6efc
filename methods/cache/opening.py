"""From the run-time axes of a method to a cache: the eviction value opens it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvlab import KvlabError
from kvlab.methods.axis import Method, MethodError
from kvlab.methods.budget.amount import fixed, least_rows
from kvlab.methods.budget.budget import Budget
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.storage import PlainStorage, Space, Storage
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.segments import runs_by_row
from kvlab.methods.prefill.params import prefill_of
from kvlab.methods.registry import refuse_misfits, refuse_unread, resolve

if TYPE_CHECKING:
    from kvlab.methods.cache.ranking import InSlots


@dataclass(frozen=True, slots=True)
class Opening:
    """What a cache is opened for.

    Attributes:
        config: of the decoder whose past it holds, its sharing applied (`Method.acting`).
        method: its run-time axes count: eviction, and what that consumes of budget and precision.
        batch: sequences, left-padded to one length.
        rows: the longest a sequence gets, padding included (blocks for a block decoder).
        device, dtype: of the keys and values.
    """

    config: DecoderConfig
    method: Method
    batch: int
    rows: int
    device: torch.device
    dtype: torch.dtype

    def readers(self) -> dict[int, list[int]]:
        """KV layer -> the decoder layers that read it, in order."""
        found: dict[int, list[int]] = {}
        for layer, kv in enumerate(self.config.kv_of):
            found.setdefault(kv, []).append(layer)
        return found

    def window(self, readers: Sequence[int]) -> int:
        """Rows that these decoder layers can still read of a KV layer, by the model's own rule."""
        windows = [self.config.windows[i] if self.config.windows else None for i in readers]
        return max(self.rows if window is None else min(window, self.rows) for window in windows)

    def storage(self, rows: int, heads: int | None = None) -> Storage:
        """Return storage for so many rows of one KV layer, at the method's precision.

        Args: heads: that rows are held for; None: the decoder's KV heads.
        """
        c = self.config
        heads = heads or c.kv_heads
        space = Space(self.batch, heads, rows, c.head_dim, self.device, self.dtype)
        choice = self.method.choices.get("precision")
        if choice is None or choice.value.implementation is None:
            return PlainStorage(None, space)
        storage: Storage = choice.value.load()(choice.params, space)
        return storage

    def stores_by_row(self) -> bool:
        """Whether a row's stored form depends on that row alone; see `Storage`."""
        choice = self.method.choices.get("precision")
        if choice is None or choice.value.implementation is None:
            return True
        return bool(choice.value.load().by_row)

    def budget(self) -> Budget:
        """Return the method's budget."""
        choice = self.method["budget"]
        budget: Budget = choice.value.load()(choice.params)
        return budget

    def least(self) -> int:
        """Rows that every layer must keep for the method's eviction to mean anything."""
        return least_rows(self.method)


class Eviction(ABC):
    """What a value of the eviction axis names as its implementation; made as `cls(params)`.

    One that keeps rows by their number is a `Policy`, one that ranks them a `Ranking`; any other
    brings a `Cache` of its own.
    """

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def open(self, opening: Opening) -> Cache:
        """Return an empty cache."""

    def scoring(
        self, config: DecoderConfig, method: Method, passes: int | None = None
    ) -> Cache | None:
        """Return a cache under which one parallel pass reads what a live cache would have kept.

        Args:
            method: all run-time axes. passes: as `Decoder.body` takes them.

        None where only a token-by-token pass can tell: a choice that depends on content.
        """
        return None

    def in_slots(self) -> InSlots | None:
        """Return how a server may keep its rows in slots; None: it cannot."""
        return None


def open_cache(
    config: DecoderConfig,
    apply: Method | None,
    *,
    batch: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Cache:
    """Return the cache that the run-time axes of a method ask for; see `Opening`.

    Args:
        apply: None is the full cache.
        tokens: positions of a sequence at most, padding included (blocks for a block decoder).

    Raises:
        MethodError: a choice on an axis that the eviction value does not read, or one that a
            decoder which takes row after row cannot have.
    """
    method = apply or resolve({})
    refuse_unread(method)
    refuse_misfits(method, config)
    if runs_by_row(config, prefill_of(method).passes):
        _refuse_prompts(method)
    return _eviction(method).open(Opening(config, method, batch, tokens, device, dtype))


def _refuse_prompts(method: Method) -> None:
    """Refuse what is decided over a prompt, where its rows come one by one: the first is all of it.

    Raises:
        MethodError: in one line.
    """
    eviction, budget = method["eviction"], method["budget"]
    if "budget" not in eviction.value.consumes or not least_rows(method):
        return
    needs = None
    if eviction.value.grows is not None and eviction.value.grows(eviction.params):
        needs = f"{eviction.value.name} cuts a prompt"
    elif budget.value.observes_all:
        needs = f"{budget.value.name} measures a prompt"
    elif fixed(method, 1)["budget"].params != budget.params:
        needs = f"a share in {budget.value.name} is of a prompt"
    if needs:
        raise MethodError(
            f"{needs}, and this model reads one row after another (sequential): give a budget in "
            "tokens with an eviction that goes on, or 'prefill' with passes"
        )


def one_pass_cache(config: DecoderConfig, apply: Method | None) -> Cache | None:
    """Return the cache of one pass over whole sequences under the run-time axes of a method.

    Args:
        apply: None is full attention.

    Raises:
        KvlabError: only a token-by-token pass can tell what the cache would keep; see
            `scores_in_one_pass`.
    """
    if apply is None:
        return None
    cache = _scoring_cache(config, apply)
    if cache is None:
        raise KvlabError(f"what '{apply.label}' keeps shows only token by token: start a session")
    return cache


def scores_in_one_pass(config: DecoderConfig, apply: Method) -> bool:
    """Whether one parallel pass can read what a live cache would have kept."""
    return _scoring_cache(config, apply) is not None


def _scoring_cache(config: DecoderConfig, apply: Method) -> Cache | None:
    refuse_unread(apply)
    precision = apply.choices.get("precision")
    if precision is not None and not precision.is_default:
        return None
    return _eviction(apply).scoring(config, apply, prefill_of(apply).passes)


def last_reads(kv_of: Sequence[int]) -> dict[int, list[int]]:
    """Decoder layer -> the KV layers that no later one reads or writes in the same pass."""
    last: dict[int, int] = {}
    for layer, kv in enumerate(kv_of):
        last[kv] = max(layer, kv)
    ends: dict[int, list[int]] = {}
    for kv, layer in last.items():
        ends.setdefault(layer, []).append(kv)
    return ends


def _eviction(method: Method) -> Eviction:
    choice = method["eviction"]
    eviction: Eviction = choice.value.load()(choice.params)
    return eviction
