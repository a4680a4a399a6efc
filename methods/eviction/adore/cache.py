"""ADORE's cache: slots for m rows, a log of all tokens, and rows that are rebuilt for a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.evicting import EvictingCache
from kvlab.methods.cache.interface import Extra, Keys, Step, copy_saved
from kvlab.methods.cache.opening import Opening
from kvlab.methods.cache.table import Table
from kvlab.methods.eviction.adore.offload import Offloaded
from kvlab.methods.eviction.adore.ranking import Adore
from kvlab.methods.eviction.adore.scores import Fresh, Scores

LOG = "adore."
"""Begins the names of what a saved cache keeps of every token."""


class AdoreCache(EvictingCache):
    """Keeps the rows of highest score; each step also reads R others, made anew from their ids.

    What is rebuilt goes through all layers beside the current token, at its own position, and reads
    what stands before it: of the kept rows, of the rebuilt. Layers that still hold a rebuilt token
    (budgets may differ) read it once.
    """

    _ranking: Adore

    def __init__(self, ranking: Adore, opening: Opening, scores: Scores) -> None:
        super().__init__(ranking, opening)
        self._params, self._scores = ranking.params, scores
        self.observes_all = True
        self._masked = True  # rebuilt rows see no key from after them
        device = opening.device
        self._ids = torch.zeros(opening.batch, opening.rows + 1, dtype=torch.int32, device=device)
        count = scores.layers
        self._number = {kv: i if count > 1 else 0 for i, kv in enumerate(sorted(self._readers))}
        self._known = torch.full((count, *self._ids.shape), float("-inf"), device=device)
        ranking.known = self._number, self._known
        fetches = ranking.params.source == "offload" and ranking.params.rebuild
        self._offloaded = Offloaded(opening) if fetches else None
        self._waits = self._waits or scores.wants_mass
        self._steps = 0
        self._others: Tensor | None = None
        self._begin_pass()

    def plan(self, step: Step) -> Extra | None:
        self._begin_pass()
        if self._seen + step.rows <= self._opening.rows:  # else it is refused next
            self._see(step)
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
        ids = self._ids.gather(1, rebuilt.clamp_min(0)).long()
        return Extra(ids, rebuilt)

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
        k, v = torch.cat((keys.k, beside[0]), dim=2), torch.cat((keys.v, beside[1]), dim=2)
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
            self._scores.credit(self._number[kv], key_mass.sum(1), read)
        super().observe(layer, before[:, :rows], after[:, :rows], key_mass)

    def finish(self) -> None:
        if not self._seen and self._scores.wants_mass:
            self._score(self._step.rows, anew=True)
        if self._params.readmit:
            self._readmit()
        super().finish()
        self._begin_pass()

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
        return {"ids": self._ids, "known": self._known, **self._scores.tensors(), **rows}

    def _begin_pass(self) -> None:
        self._others = None
        self._beside: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: dict[int, Tensor] = {}
        self._joins: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _see(self, step: Step) -> None:
        """Take in the pass's tokens, and score all of them for its last one."""
        if step.ids is None or step.embedded is None:
            raise KvlabError("adore releases tokens: this decoder runs over blocks of them")
        ids, embedded = step.ids, step.embedded
        batch, rows = ids.shape
        places, counts = step.positions, torch.full((batch,), rows, device=ids.device)
        if places is None:
            places = torch.arange(rows, device=ids.device).expand(batch, -1)
        elif rows > 1:  # padding stands before a sample's own rows, and goes behind them
            counts = (places != EMPTY).sum(1)
            order = torch.arange(rows, device=ids.device) - counts.unsqueeze(1)
            order = torch.remainder(order, rows)
            places = places.gather(1, order)
            places = torch.where(places == EMPTY, self._opening.rows, places)
            ids = ids.gather(1, order)
            embedded = embedded.gather(1, order.unsqueeze(-1).expand_as(embedded))
        self._ids.scatter_(1, places, ids.int())
        self._now = torch.where(places < self._opening.rows, places, EMPTY).amax(1, keepdim=True)
        self._scores.see(Fresh(embedded, places, counts))
        if self._seen or not self._scores.wants_mass:
            anew = not self._seen or rows > 1 or self._steps % self._params.refresh == 0
            self._score(self._seen + rows, anew)

    def _score(self, count: int, anew: bool) -> None:
        """Bring scores up to date: of the first `count` positions, or of what is held alone."""
        if anew:
            self._known[:, :, :count] = self._scores.every(count, self._now)
            return
        for layer, held in self._held():
            number = self._number[layer]
            place = torch.where(held == EMPTY, self._opening.rows, held)
            found = self._scores.of(number, place, self._now)
            self._known[number].scatter_(1, place, found)

    def _rebuilt(self, step: Step) -> Tensor | None:
        """Choose what to rebuild: positions [B, R], EMPTY where fewer tokens were released."""
        params = self._params
        longest = int(self._lengths.max()) + self._seen - self._prompt
        if not params.rebuild or longest <= int(self._rows.min()):
            return None  # nothing was released yet
        if step.rows == 1 and self._steps % params.every:
            return None
        count = self._seen + step.rows
        scores, away = self._released(count)
        each = params.context + 1
        best = scores.topk(min(params.rebuild // each, count), dim=-1)
        limit = float("-inf") if params.threshold is None else _logit(params.threshold)
        chosen = torch.where(best.values > limit, best.indices, EMPTY)
        return chosen if each == 1 else self._with_context(chosen, away)

    def _with_context(self, chosen: Tensor, away: Tensor) -> Tensor:
        """Add to positions [B, n] those before each that are away too; none comes twice."""
        before = torch.arange(self._params.context + 1, device=chosen.device)
        runs = (chosen.unsqueeze(-1) - before).masked_fill((chosen == EMPTY).unsqueeze(-1), EMPTY)
        ordered = runs.flatten(1).clamp_min(EMPTY).sort(dim=-1).values
        twice = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        there = away.gather(1, ordered.clamp_min(0))
        return ordered.masked_fill(twice | ~there, EMPTY)

    def _held(self) -> Iterator[tuple[int, Tensor]]:
        """For all that keep rows alike, one KV layer and the positions [B, C] that it holds."""
        for table in self._tables:
            yield from zip(table.layers, table.positions[:, :, 0], strict=False)

    def _released(self, count: int) -> tuple[Tensor, Tensor]:
        """What a layer lacks of the first `count` positions, but for the rows of this pass.

        Returns: the highest score [B, count] in a layer that lacks it, -inf where none does; and
            a mark [B, count] where one does.
        """
        own = self._positions()
        past = torch.arange(count, device=own.device) <= self._now
        away = torch.zeros_like(past)
        scores = torch.full(past.shape, float("-inf"), device=own.device)
        for layer, held in self._held():
            place = torch.cat((held, own), dim=1)
            place = torch.where(place == EMPTY, self._opening.rows, place)
            lacks = torch.ones_like(self._ids, dtype=torch.bool).scatter_(1, place, False)
            lacks = lacks[:, :count] & past
            known = self._known[self._number[layer], :, :count]
            scores = torch.maximum(scores, known.masked_fill(~lacks, float("-inf")))
            away |= lacks
        return scores, away

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
        held = self._table[layer].at(layer)[:, 0]
        twice = (held.unsqueeze(2) == self._others.unsqueeze(1)).any(1)
        return self._others.masked_fill(twice, EMPTY)

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


def _logit(share: float) -> float:
    return float(torch.logit(torch.tensor(share, dtype=torch.float64)))
