"""ADORE's cache: slots for m rows, a log of all tokens, and rows that are rebuilt for a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.budget.budget import Budget
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.interface import Extra, Keys, Step, copy_saved
from kvlab.methods.cache.opening import Opening
from kvlab.methods.cache.table import Table
from kvlab.methods.eviction.adore.log import Held, Log, lacking
from kvlab.methods.eviction.adore.offload import Offloaded
from kvlab.methods.eviction.adore.ranking import Adore
from kvlab.methods.eviction.adore.scores import Scores

LOG = "adore."
"""Begins the names of what a saved cache keeps of every token."""


class AdoreCache(EvictingCache):
    """Keeps the rows of highest score; each step also reads R others, made anew from their ids.

    What is rebuilt goes through all layers beside the current token, at its own position, and reads
    what stands before it: of the kept rows, of the rebuilt. Layers that still hold a rebuilt token
    (budgets may differ) read it once.
    """

    _ranking: Adore

    def __init__(
        self, ranking: Adore, opening: Opening, scores: Scores, budget: Budget | None = None
    ) -> None:
        super().__init__(ranking, opening, budget=budget)
        self._params, self._scores = ranking.params, scores
        self.observes_all = True
        self._masked = True  # rebuilt rows see no key from after them
        self.log = Log(ranking, scores, opening.batch, self._readers)
        fetches = ranking.params.source == "offload" and ranking.params.rebuild
        self._offloaded = Offloaded(opening) if fetches else None
        self._waits = self._waits or scores.wants_mass
        self._steps = 0
        self._others: Tensor | None = None
        self._begin_pass()

    def plan(self, step: Step) -> Extra | None:
        self._begin_pass()
        if self._seen + step.rows <= self._opening.rows:  # else it is refused next
            self.log.see(step)
            if self._seen or not self._scores.wants_mass:
                anew = not self._seen or step.rows > 1 or self._steps % self._params.refresh == 0
                self._score(self._seen + step.rows, anew)
        super().plan(step)
        if not self._seen:
            return None
        self._steps += step.rows == 1
        rebuilt = self._rebuilt(step)
        if rebuilt is None:
            return None
        self._others = rebuilt
        if self._offloaded is not None:
            return None
        return Extra(self.log.ids_of(rebuilt), rebuilt)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        rows = self._step.rows
        own_k, own_v = k[:, :, :rows], v[:, :, :rows]
        if self._offloaded is not None:
            self._offloaded.put(layer, own_k, own_v, self._positions())
            if self._others is not None:
                self._beside[layer] = self._offloaded.get(layer, self._others)
        elif k.shape[2] > rows:
            self._beside[layer] = k[:, :, rows:], v[:, :, rows:]
        super().write(layer, own_k, own_v, None if positions is None else positions[:, :rows])

    def read(self, layer: int) -> Keys | None:
        keys, beside = super().read(layer), self._beside.get(layer)
        if keys is not None and beside is None and keys.positions is not None:
            self._read[layer] = keys.positions
        if keys is None or beside is None:
            return keys
        k, v = keys.rows(beside[0].dtype)
        k, v = torch.cat((k, beside[0]), dim=2), torch.cat((v, beside[1]), dim=2)
        return Keys(k, v, self._joined(layer, keys))

    def key_mass_rows(self, layer: int) -> slice | None:
        if self._scores.wants_mass:
            return slice(0, self._step.rows)
        return super().key_mass_rows(layer)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        rows = self._step.rows
        if self._scores.wants_mass and key_mass is not None:
            kv = self._kv_of[layer]
            read = self._read.get(kv, self._positions())
            self._scores.credit(self.log.number[kv], key_mass.sum(1), read)
        super().observe(layer, before[:, :rows], after[:, :rows], key_mass)

    def finish(self) -> None:
        if not self._seen and self._scores.wants_mass:
            self._score(self._step.rows, anew=True)
        if self._params.readmit:
            self._readmit()
        super().finish()
        self._begin_pass()

    def freeze(self) -> bool:
        return False  # what is rebuilt and scored turns on counts of the host

    def nbytes(self) -> int:
        logged = sum(tensor.untyped_storage().nbytes() for tensor in self._logged().values())
        return super().nbytes() + logged + self._scores.shared_bytes()

    def state(self) -> dict[str, Tensor]:
        logged = {f"{LOG}{name}": tensor for name, tensor in self._logged().items()}
        return {**super().state(), **logged, "steps": torch.tensor(self._steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        logged = {f"{LOG}{name}": tensor for name, tensor in self._logged().items()}
        copy_saved({name: t for name, t in state.items() if name.startswith(LOG)}, logged)
        super().restore(state)
        self._steps = int(state["steps"])

    def _logged(self) -> dict[str, Tensor]:
        """What is kept of every token, released or not."""
        rows = {} if self._offloaded is None else self._offloaded.tensors()
        return {**self.log.tensors(), **rows}

    def _begin_pass(self) -> None:
        if self._offloaded is not None:
            self._offloaded.begin()
        self._others = None
        self._beside: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: dict[int, Tensor] = {}
        self._joins: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _score(self, count: int, anew: bool) -> None:
        """Bring scores up to date: of the first `count` positions, or of what is held alone."""
        if anew:
            self.log.score(count)
        else:
            self.log.score_held(self._held())

    def _rebuilt(self, step: Step) -> Tensor | None:
        """Choose what to rebuild: positions [B, R], EMPTY where fewer tokens were released."""
        params = self._params
        longest = int(self._lengths.max()) + self._seen - self._prompt
        if not params.rebuild or longest <= int(self._rows.min()):
            return None  # nothing was released yet
        if step.rows == 1 and self._steps % params.every:
            return None
        return self.log.rebuilt(self._held(), self._positions(), self._seen + step.rows)

    def _held(self) -> Held:
        """The positions that are held, of all that keep rows alike once."""
        return [(table.layers, table.positions[:, :, 0]) for table in self._tables]

    def _joined(self, layer: int, keys: Keys) -> Tensor:
        """The positions of a layer's rows and of those beside them; one object where all agree."""
        assert keys.positions is not None
        table = self._table[layer]
        key = id(table), table.place_of[layer]
        known = self._joins.get(key)
        if known is None:
            others = self._lacking(layer)
            known = self._joins[key] = others, torch.cat((keys.positions, others), dim=1)
        self._read[layer] = known[1]
        return known[1]

    def _lacking(self, layer: int) -> Tensor:
        """The rebuilt positions [B, R], EMPTY where this layer holds the token itself."""
        assert self._others is not None
        if len(self._tables) == len(self._tables[0].positions) == 1:
            return self._others
        return lacking(self._others, self._table[layer].at(layer)[:, 0])

    def _readmit(self) -> None:
        """Let what was rebuilt compete for the layers' slots."""
        if not self._beside:
            return
        for layer, (k, v) in self._beside.items():
            table = self._table[layer]
            others = self._joins[id(table), table.place_of[layer]][0]
            slots = table.merge(layer, others, None, self._newest, self._window(table))
            self._put(layer, table, slots, k, v)
        for table in self._tables:
            table.begin()
            table.low = min(table.low, table.usable - 1)

    def _put(self, layer: int, table: Table, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows whose slots are not negative; by a free slot's help without waiting."""
        storage = self._storage[layer]
        if not storage.by_row:
            storage.put(slots, k, v)
            return
        free = table.at(layer) == EMPTY  # one at least: a step's slot beside the budget's
        if table.shut is not None:
            free = free & ~table.shut
        slots = torch.where(slots < 0, free.to(torch.uint8).argmax(-1, keepdim=True), slots)
        for row in range(slots.shape[-1]):
            part = slice(row, row + 1)
            storage.put(slots[..., part], k[:, :, part], v[:, :, part])
