"""Storage of a decoder's past: preallocated slots per layer, written in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY, Rule
from kvlab.kernels.stored import Stored
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step, copy_saved, refuse_beyond
from kvlab.methods.cache.opening import Opening, last_reads
from kvlab.methods.cache.policy import Policy
from kvlab.methods.cache.storage import Storage


class _Table:
    """The positions [B, C] in the slots of every layer that has C of them.

    Attributes:
        held: slots in use when its queries read; `readable`: positions they may meet, as `read`
            returns them. before, past: the same of KV layers that the pass has not written yet.
        exact: whether every query may read every held row; false where layers with other windows
            share a KV layer.
        direct: whether the pass writes its rows where they stay, before they are read.
        rows, slots: the rows of the pass that stay after it, and where they go.
        upcoming: the slots of all further rows, one by one; while the cache is frozen.
        began, lengths: rows that were seen when it was, and [B] slots in use or more since then.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.positions = torch.full((batch, capacity), EMPTY, device=device)
        self.held = 0
        self.exact = True
        self.direct = False
        self.readable: Tensor | None = None
        self.before = 0
        self.past: Tensor | None = None
        self.rows: slice | Tensor = slice(0)
        self.slots: slice | Tensor = slice(0)
        self.upcoming = torch.empty(0)
        self.began = 0
        self.lengths: Tensor | None = None

    def place(self, policy: Policy, seen: int, arriving: int) -> None:
        """Find where rows number `seen` and on go; of two rows for one slot the later one stays."""
        owner = {policy.slot(seen + row, self.capacity): row for row in range(arriving)}
        ordered = sorted(owner.items(), key=lambda item: item[1])
        device = self.positions.device
        self.slots = _index([slot for slot, _ in ordered], device)
        self.rows = _index([row for _, row in ordered], device)
        # One row drops only what its query may not read; several may drop what the first may read.
        self.direct = seen > 0 and (arriving == 1 or seen + arriving <= self.capacity)
        self.lengths = None
        self.before = min(seen, self.capacity)
        self.held = min(seen + arriving, self.capacity) if self.direct else self.before

    def freeze(self, policy: Policy, seen: int, limit: int, padded: bool) -> None:
        """Read all slots from now on; by their positions, unless the next row fills the last."""
        slots = [policy.slot(row, self.capacity) for row in range(seen, limit)]
        self.upcoming = torch.tensor(slots, device=self.positions.device)
        self.rows, self.direct = slice(0, 1), True
        self.before = self.held = self.capacity
        self.began = seen
        whole = seen + 1 >= self.capacity and self.exact and not padded
        # Of the past, a row's position may show where what it pushes out, or nothing, still lies:
        # who reads before it is written reads what stands before it.
        self.past, self.readable = self.positions, None if whole else self.positions

    def take(self, since: Tensor) -> None:
        """Find the slot of the next row, number `since` [1] from when it was frozen."""
        self.slots = self.upcoming.index_select(0, since)
        if self.began + 1 < self.capacity:
            self.lengths = (since + self.began + 1).expand(len(self.positions))

    def store(self, positions: Tensor) -> None:
        self.positions[:, self.slots] = positions[:, self.rows]


class _Layer:
    """A KV layer's storage, and the rows of this pass that are not in it yet."""

    def __init__(self, storage: Storage, table: _Table) -> None:
        self.storage, self.table = storage, table
        self.fresh: tuple[Tensor, Tensor] | None = None

    def keys(self, rows: int, positions: Tensor | None) -> Keys:
        """The first rows as they lie."""
        k, v, stored = self.storage.lying(rows)
        if self.table.lengths is not None:
            stored = replace(stored or Stored(), lengths=self.table.lengths)
        return Keys(k, v, positions, stored)


class SlotCache(Cache):
    """The cache of every policy that decides by a row's number: full attention, windows, sinks.

    A prompt's rows are read as they come, and each KV layer stores what stays when its last reader
    has read. Later rows are written into their slots first and read where they lie, so a decode
    step copies no past row; where several rows would push out rows they may still read, the past is
    joined with them instead.

    Args:
        policy: what stays.
        opening: how large, where, and which layers read which.
    """

    def __init__(self, policy: Policy, opening: Opening) -> None:
        self._policy = policy
        self._limit = opening.rows
        self._seen = 0
        self._since: Tensor | None = None  # [1], rows since the cache was frozen
        self._arriving = 0
        self._padded = False
        self._positions: Tensor | None = None
        self._tables: dict[int, _Table] = {}
        self._layers: dict[int, _Layer] = {}
        self._written: set[int] = set()
        self._ends = last_reads(opening.config.kv_of)
        sharing = opening.config.sharing
        for kv, readers in opening.readers().items():
            capacity = min(policy.capacity(kv, opening.rows), opening.window(readers))
            if capacity not in self._tables:
                self._tables[capacity] = _Table(opening.batch, capacity, opening.device)
            table = self._tables[capacity]
            table.exact &= all(opening.window([reader]) >= capacity for reader in readers)
            table.exact &= sharing is None or not sharing.strict
            self._layers[kv] = _Layer(opening.storage(capacity), table)

    def rule(self, layer: int, own: Rule) -> Rule:
        return self._policy.rule(layer, own)

    def plan(self, step: Step) -> Extra | None:
        refuse_beyond(self._limit, self._seen + step.rows)
        self._arriving, self._positions = step.rows, step.positions
        if step.rows > 1:
            self.thaw()
        if step.positions is not None and (step.rows > 1 or not self._seen):
            self._padded = True  # as far as anyone can tell without asking the device
            self._refuse_gaps(step.positions)
        self._written.clear()
        if self._since is not None:
            for table in self._tables.values():
                table.take(self._since)
                table.store(self._known())
            return None
        for table in self._tables.values():
            table.place(self._policy, self._seen, step.rows)
            if not self._seen:
                table.readable = step.positions
                continue
            table.past = table.positions[:, : table.before]
            if not table.direct:
                table.readable = torch.cat((table.past, self._known()), dim=1)
                continue
            table.store(self._known())
            masked = self._padded or step.rows > 1 or not table.exact
            table.readable = table.positions[:, : table.held] if masked else None
            # A full ring shows the new row's position where the row that it pushes out still lies.
            if not masked and table.before < table.held:
                table.past = None
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        store = self._layers[layer]
        self._written.add(layer)
        if store.table.direct:
            store.storage.put(store.table.slots, k, v)
        else:
            store.fresh = k, v

    def read(self, layer: int) -> Keys | None:
        store = self._layers[layer]
        table = store.table
        if layer not in self._written:
            return store.keys(table.before, table.past) if table.before else None
        if store.fresh is None:
            return store.keys(table.held, table.readable)
        k, v = store.fresh
        if table.held:
            past_k, past_v = store.storage.get(table.held)
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        return Keys(k, v, table.readable)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        """Store the rows that stay, and let go of the others: nobody reads them any more."""
        for ended in self._ends.get(layer, ()):
            store = self._layers[ended]
            if store.fresh is not None:
                (k, v), rows = store.fresh, store.table.rows
                store.storage.put(store.table.slots, k[:, :, rows], v[:, :, rows])
                store.fresh = None

    def finish(self) -> None:
        for table in self._tables.values():
            if not table.direct:
                table.store(self._known())
        self._seen += self._arriving
        if self._since is not None:
            self._since += 1

    def freeze(self) -> bool:
        by_row = all(layer.storage.by_row for layer in self._layers.values())
        if not by_row or not 0 < self._seen < self._limit:
            return False
        if self._since is None:
            for table in self._tables.values():
                table.freeze(self._policy, self._seen, self._limit, self._padded)
            self._since = torch.zeros(1, dtype=torch.long, device=table.positions.device)
        return True

    def thaw(self) -> None:
        self._since = None

    def advance(self, passes: int) -> None:
        if self._since is None:
            super().advance(passes)  # which refuses it
        refuse_beyond(self._limit, self._seen + passes)
        self._seen += passes

    def parts(self) -> list[object]:
        return [self, *self._tables.values()]

    def state(self) -> dict[str, Tensor]:
        """Return the live tensors by name, and how many rows were seen; save them before a pass."""
        state = {
            f"{kv}.{name}": tensor
            for kv, layer in self._layers.items()
            for name, tensor in layer.storage.state().items()
        }
        for capacity, table in self._tables.items():
            state[f"positions.{capacity}"] = table.positions
        return state | {"seen": torch.tensor([self._seen, self._padded])}

    def restore(self, state: dict[str, Tensor]) -> None:
        live = self.state()
        copy_saved(state, live)
        seen, padded = live["seen"].tolist()
        self._seen, self._padded = seen, bool(padded)
        self.thaw()

    def nbytes(self) -> int:
        rows = sum(layer.storage.nbytes() for layer in self._layers.values())
        tables = (table.positions.untyped_storage() for table in self._tables.values())
        return rows + sum(table.nbytes() for table in tables)

    def _known(self) -> Tensor:
        """The positions [B or 1, T] of the pass's rows."""
        if self._positions is not None:
            return self._positions
        if self._seen:
            raise KvlabError("only the first pass over a cache may leave its positions out")
        device = next(iter(self._tables.values())).positions.device
        return torch.arange(self._arriving, device=device).unsqueeze(0)

    def _refuse_gaps(self, positions: Tensor) -> None:
        """Refuse padding behind a sample's first row where slots are few: it would push rows out.

        Asks the device, so only where a later pass of several rows meets such slots.
        """
        table = self._tables[min(self._tables)]
        if not self._seen or table.capacity == self._limit:
            return
        began = (table.positions != EMPTY).any(1, keepdim=True)
        real = torch.cat((began, positions != EMPTY), dim=1)
        if bool((real.cumsum(1)[:, :-1].bool() & ~real[:, 1:]).any()):
            raise KvlabError(
                "padding between the turns of a conversation would push out rows that count: with "
                "sliding windows give turns of one length, or one sequence at a time"
            )


def _index(numbers: list[int], device: torch.device) -> slice | Tensor:
    """A slice where the numbers are consecutive: it copies less than an index."""
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, device=device)
