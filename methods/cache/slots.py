"""Storage of a decoder's past: preallocated slots per layer, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY, Rule
from kvlab.methods.axis import Method, resolve
from kvlab.methods.cache.ephemeral import EphemeralCache
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.policy import Policy
from kvlab.methods.decoder.config import DecoderConfig


class _Table:
    """The positions [B, C] in the slots of every layer that has C of them.

    Attributes:
        held: slots in use before the pass; `readable`: positions its queries may meet, as `read`
            returns them.
        rows, slots: the rows of the pass that stay after it, and where they go.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.positions = torch.full((batch, capacity), EMPTY, device=device)
        self.held = 0
        self.readable: Tensor | None = None
        self.rows: slice | Tensor = slice(0)
        self.slots: slice | Tensor = slice(0)

    def place(self, policy: Policy, seen: int, arriving: int) -> None:
        """Find where rows number `seen` and on go; of two rows for one slot the later one stays."""
        owner = {policy.slot(seen + row, self.capacity): row for row in range(arriving)}
        ordered = sorted(owner.items(), key=lambda item: item[1])
        device = self.positions.device
        self.slots = _index([slot for slot, _ in ordered], device)
        self.rows = _index([row for _, row in ordered], device)

    def store(self, positions: Tensor) -> None:
        self.positions[:, self.slots] = positions[:, self.rows]


class _Layer:
    """Keys and values [B, H_kv, C, D], and the rows of this pass that are not in them yet."""

    def __init__(self, k: Tensor, v: Tensor, table: _Table) -> None:
        self.k, self.v, self.table = k, v, table
        self.fresh: tuple[Tensor, Tensor] | None = None


class SlotCache(Cache):
    """The cache of every policy that decides by a row's number: full attention, windows, sinks.

    A pass of several rows (a prompt, or more of it) reads past rows and its own, and each layer
    stores what stays as soon as it has read. A pass of one row overwrites its slot first and reads
    the storage where it lies: a decode step copies no past row.

    Args:
        config: of the decoder whose past it holds.
        policy: what stays.
        batch: sequences, left-padded to one length.
        rows: the longest a sequence gets, padding included.
    """

    def __init__(
        self,
        config: DecoderConfig,
        policy: Policy,
        *,
        batch: int,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._policy = policy
        self._limit = rows
        self._seen = 0
        self._arriving = 0
        self._padded = False
        self._positions: Tensor | None = None
        self._tables: dict[int, _Table] = {}
        self._layers: list[_Layer] = []
        for layer, window in enumerate(config.windows or (None,) * config.layers):
            capacity = min(policy.capacity(layer, rows), window or rows, rows)
            if capacity not in self._tables:
                self._tables[capacity] = _Table(batch, capacity, device)
            shape = (batch, config.kv_heads, capacity, config.head_dim)
            k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
            self._layers.append(_Layer(k, v, self._tables[capacity]))

    def rule(self, layer: int, own: Rule) -> Rule:
        return self._policy.rule(layer, own)

    def plan(self, step: Step) -> Extra | None:
        if self._seen + step.rows > self._limit:
            raise KvlabError(
                f"the cache was opened for {self._limit} positions and is asked for "
                f"{self._seen + step.rows}: start the session with more new_tokens"
            )
        self._arriving, self._positions = step.rows, step.positions
        if not self._seen:
            self._padded = step.positions is not None
        for table in self._tables.values():
            table.place(self._policy, self._seen, step.rows)
            table.held = min(self._seen, table.capacity)
            if not self._seen:
                table.readable = step.positions
            elif self._one:
                table.store(self._known())
                held = min(self._seen + 1, table.capacity)
                table.readable = table.positions[:, :held] if self._padded else None
            else:
                past = table.positions[:, : table.held]
                table.readable = torch.cat((past, self._known()), dim=1)
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        store = self._layers[layer]
        if self._one:
            store.k[:, :, store.table.slots] = k
            store.v[:, :, store.table.slots] = v
        else:
            store.fresh = k, v

    def read(self, layer: int) -> Keys:
        store = self._layers[layer]
        table = store.table
        if store.fresh is None:
            held = min(self._seen + 1, table.capacity)
            return Keys(store.k[:, :, :held], store.v[:, :, :held], table.readable)
        k, v = store.fresh
        if table.held:
            k = torch.cat((store.k[:, :, : table.held], k), dim=2)
            v = torch.cat((store.v[:, :, : table.held], v), dim=2)
        return Keys(k, v, table.readable)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        """Store the rows that stay, and let go of the others: this layer has read them."""
        store = self._layers[layer]
        if store.fresh is not None:
            k, v = store.fresh
            store.k[:, :, store.table.slots] = k[:, :, store.table.rows]
            store.v[:, :, store.table.slots] = v[:, :, store.table.rows]
            store.fresh = None

    def finish(self) -> None:
        if not self._one:
            for table in self._tables.values():
                table.store(self._known())
        self._seen += self._arriving

    def nbytes(self) -> int:
        storages = [t for layer in self._layers for t in (layer.k, layer.v)]
        storages += [table.positions for table in self._tables.values()]
        return sum(t.untyped_storage().nbytes() for t in storages)

    @property
    def _one(self) -> bool:
        """Whether the pass adds one row to a past."""
        return self._seen > 0 and self._arriving == 1

    def _known(self) -> Tensor:
        """The positions [B or 1, T] of the pass's rows."""
        if self._positions is not None:
            return self._positions
        if self._seen:
            raise KvlabError("only the first pass over a cache may leave its positions out")
        device = next(iter(self._tables.values())).positions.device
        return torch.arange(self._arriving, device=device).unsqueeze(0)


def open_cache(
    config: DecoderConfig,
    apply: Method | None,
    *,
    batch: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Cache:
    """Return the cache that the run-time axes of a method ask for.

    Args:
        config: of the decoder whose past it will hold.
        apply: its eviction counts; None is the full cache.
        batch: sequences, left-padded to one length.
        tokens: positions of a sequence at most, padding included (blocks for a block decoder).
        device, dtype: of the storages.
    """
    choice = (apply or resolve({}))["eviction"]
    policy: Policy = choice.value.load()(choice.params)
    return SlotCache(config, policy, batch=batch, rows=tokens, device=device, dtype=dtype)


def scoring_cache(apply: Method) -> Cache | None:
    """Return the cache under which one pass scores what the run-time axes would have kept.

    None where only a token-by-token pass can tell: a choice that depends on content.
    """
    choice = apply["eviction"]
    kind = choice.value.load()
    return EphemeralCache(kind(choice.params)) if issubclass(kind, Policy) else None


def _index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """A slice where the numbers are consecutive: it copies less than an index."""
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, device=device)
