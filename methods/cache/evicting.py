"""The cache of every eviction that ranks rows, under every budget, at every precision."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY, Rule
from kvlab.methods.budget.budget import Budget, Evidence
from kvlab.methods.cache.importance import Importance
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step, copy_saved, refuse_beyond
from kvlab.methods.cache.opening import Opening, last_reads
from kvlab.methods.cache.ranking import Ranking
from kvlab.methods.cache.storage import Storage
from kvlab.methods.cache.table import Held, Table, by_head
from kvlab.methods.cache.windows import ReadsWindow


class EvictingCache(Cache):
    """Slots for each KV layer, of which a ranking says what leaves and a budget how many there are.

    A prompt is read in full. As soon as the last layer that reads a KV layer has, its best rows are
    copied out and the others let go of; where the budget looks at all layers before it divides
    (SqueezeAttention), at the end of the prompt. A decode step overwrites one slot of each layer,
    sample and head before it reads: no row is moved. A turn of several rows reads all that is held,
    then is cut.

    Args:
        ranking: which rows stay.
        opening: how large, where, and which layers read which.
        budget: how many; None: as the method says.
        reads: a rule of its own for what queries may read.
    """

    def __init__(
        self,
        ranking: Ranking,
        opening: Opening,
        *,
        budget: Budget | None = None,
        reads: ReadsWindow | None = None,
    ) -> None:
        self._ranking, self._opening, self._reads = ranking, opening, reads
        self._budget = budget or opening.budget()
        self._measures = Importance(self._budget.importance)
        self.rotates = ranking.in_cache
        self.observes_all = (
            ranking.voters(prompt=True) is not None or self._budget.importance is not None
        )
        config = opening.config
        self._kv_of, self._readers = config.kv_of, opening.readers()
        self._ends = last_reads(config.kv_of)
        self._heads = ranking.heads(config)
        strict = config.sharing is not None and (config.sharing.strict or config.upward)
        self._masked = strict or config.windows is not None or reads is not None
        self._waits = self._budget.importance is not None
        self._tables: list[Table] = []
        self._table: dict[int, Table] = {}
        self._storage: dict[int, Storage] = {}
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self._marks: dict[int, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)
        self._lengths = torch.empty(0, dtype=torch.long)
        self._step = Step(0, None, None)
        self._newest = torch.empty(0)
        self._seen = self._prompt = 0

    def rule(self, layer: int, own: Rule) -> Rule:
        return own if self._reads is None else self._reads.rule(layer, own)

    def reserve(self, rows: int | Tensor) -> None:
        if not self._ranking.by_turn or not self._seen:
            return
        self.thaw()
        least = self._opening.least() - 1
        for table in self._tables:
            table.make_room(rows, least, self._newest)
            table.recount()

    def plan(self, step: Step) -> Extra | None:
        refuse_beyond(self._opening.rows, self._seen + step.rows)
        if step.rows > 1:
            self.thaw()
        self._step = step
        self._fresh.clear()
        self._marks.clear()
        if not self._seen:
            self._begin(step)
            return None
        if step.positions is None:
            raise KvlabError("only the first pass over a cache may leave its positions out")
        self._newest.copy_(step.positions.amax(1)[:, None, None])
        for table in self._tables:
            table.begin()
            if step.rows == 1:
                table.step(self._newest, self._window(table))
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        if self._seen:
            k, v = by_head(k, self._heads), by_head(v, self._heads)
        if self._stepping():
            table = self._table[layer]
            self._storage[layer].put(table.slots[table.place_of[layer]], k, v)
        else:
            self._fresh[layer] = k, v

    def read(self, layer: int) -> Keys | None:
        fresh = self._fresh.get(layer)
        if not self._seen:
            return None if fresh is None else Keys(*fresh, self._step.positions)
        table = self._table[layer]
        k, v, stored = self._storage[layer].lying(table.reach)
        if self._stepping() and table.exact() and not self._masked:
            return Keys(k, v, None, stored)
        held = table.at(layer)[..., : table.reach]
        if fresh is not None:
            k, v = Keys(k, v, None, stored).rows(fresh[0].dtype)
            k, v, stored = torch.cat((k, fresh[0]), dim=2), torch.cat((v, fresh[1]), dim=2), None
            own = self._positions().unsqueeze(1).expand(-1, held.shape[1], -1)
            held = torch.cat((held, own), dim=-1)
        return Keys(k, v, held if held.shape[1] > 1 else table.once(layer, held), stored)

    def rotary_positions(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self._seen:  # of the last row alone, where the others stopped at their keys
            every = positions.shape[1] == self._step.rows
            return positions, positions if every else self._positions()
        table = self._table[layer]
        if self._stepping():
            return table.standing(layer, None)
        queries, keys = table.standing(layer, self._positions())
        return queries, keys if layer in self._fresh else keys[..., : table.high]

    def key_mass_rows(self, layer: int) -> slice | None:
        rows = self._ranking.voters(prompt=not self._seen)
        wanted = self._budget.importance == "mass" and self._measuring()
        return slice(None) if rows is None and wanted else rows

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        kv = self._kv_of[layer]
        if self._measuring():
            valid = None if self._step.positions is None else self._step.positions != EMPTY
            self._measures.see(layer, before, after, key_mass, valid)
        if key_mass is not None and self._ranking.voters(prompt=not self._seen) is not None:
            self._tally(kv, self._ranking.tally(key_mass, self._heads))
        if not self._seen and self._tables:
            for ended in self._ends.get(layer, ()):
                self._settle(ended)

    def finish(self) -> None:
        if not self._seen:
            if not self._tables:
                evidence = self._evidence()
                if self._budget.importance == "ranks":
                    evidence = replace(evidence, ranks=self._ranks(evidence))
                self._build(self._budget.rows(evidence))
                for layer in self._readers:
                    self._settle(layer)
            for table in self._tables:
                table.fill(torch.minimum(table.budgets, self._lengths))
            self._measures.reset()
        elif not self._stepping():
            for layer, (k, v) in self._fresh.items():
                self._merge(layer, k, v)
            for table in self._tables:
                table.recount()
        self._fresh.clear()
        self._seen += self._step.rows
        if self._budget.refresh and self._measures.steps == self._budget.refresh:
            self._divide_anew()

    def freeze(self) -> bool:
        by_row = all(storage.by_row for storage in self._storage.values())
        if not self._seen or not by_row or self._budget.refresh is not None:
            return False
        for table in self._tables:
            table.freeze()
        return True

    def thaw(self) -> None:
        for table in self._tables:
            table.frozen = False

    def advance(self, passes: int) -> None:
        if not all(table.frozen for table in self._tables):
            super().advance(passes)  # which refuses it
        refuse_beyond(self._opening.rows, self._seen + passes)
        self._seen += passes
        for table in self._tables:
            table.advance(passes)

    def parts(self) -> list[object]:
        return [self, *self._tables]

    def nbytes(self) -> int:
        rows = sum(storage.nbytes() for storage in self._storage.values())
        return rows + sum(table.nbytes() for table in self._tables)

    def held(self, layer: int) -> Tensor:
        """The positions [B, H or 1, C] of the rows that KV layer `layer` holds, EMPTY elsewhere."""
        return self._table[layer].at(layer)

    def kept(self, layer: int) -> tuple[Held, Tensor]:
        """What KV layer `layer` holds, and the past rows [B] (on the CPU) that it may keep."""
        return self._held_rows(layer), self._table[layer].budgets

    def budgets(self) -> Tensor:
        """[B, K] on the CPU: past rows that each KV layer keeps of each sample."""
        return self._rows

    def state(self) -> dict[str, Tensor]:
        counts = [[table.low, table.high] for table in self._tables]
        found = {
            "rows": self._rows,
            "lengths": self._lengths,
            "newest": self._newest,
            "seen": torch.tensor([self._seen, self._prompt]),
            "counts": torch.tensor(counts),
            "tables": torch.tensor([number for _, number in sorted(self._table_numbers().items())]),
        }
        for i, table in enumerate(self._tables):
            found |= {f"table.{i}.{name}": t for name, t in table.tensors().items()}
        for layer, storage in self._storage.items():
            found |= {f"layer.{layer}.{name}": t for name, t in storage.state().items()}
        return found | self._measures.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        tables = state["tables"].tolist() if "tables" in state else []
        if len(tables) != len(self._readers):
            copy_saved(state, {})  # which refuses it
        self._seen, self._prompt = state["seen"].tolist()
        self._lengths = state["lengths"].to("cpu", copy=True)
        self._newest = state["newest"].to(self._opening.device, copy=True)
        numbers = dict(zip(sorted(self._readers), tables, strict=True))
        self._build(state["rows"].to("cpu", copy=True), numbers)
        copy_saved(*(
            {name: t for name, t in some.items() if name.startswith(("table.", "layer."))}
            for some in (state, self.state())
        ))  # fmt: skip
        for table, counts in zip(self._tables, state["counts"].tolist(), strict=True):
            table.low, table.high = counts
        self._measures.restore(state, self._opening.device)

    def _begin(self, step: Step) -> None:
        """Start a prompt; where the budget needs no more than lengths, divide it at once."""
        opening = self._opening
        self._prompt = step.rows
        if step.positions is None:
            self._lengths = torch.full((opening.batch,), step.rows)
            newest = torch.full((opening.batch,), step.rows - 1, device=opening.device)
        else:
            self._lengths = (step.positions != EMPTY).sum(1).cpu()
            newest = step.positions.amax(1)
        self._newest = newest[:, None, None]
        if not self._waits:
            self._build(self._budget.rows(self._evidence()))

    def _evidence(self) -> Evidence:
        opening = self._opening
        readers = tuple(tuple(readers) for _, readers in sorted(self._readers.items()))
        least, later = opening.least(), opening.rows - self._prompt
        return Evidence(
            prompt=self._lengths,
            most=(self._lengths + (0 if self._ranking.grows else later)).clamp(min=least),
            least=least,
            window=getattr(self._ranking.params, "window", None) or 0,
            readers=readers,
            cosines=self._measures.cosines(opening.config.layers),
            spread=self._measures.spread(opening.config.layers),
        )

    def _ranks(self, evidence: Evidence) -> Tensor:
        """[B, K, S] mean ranks of the prompt's rows, as under even budgets."""
        found = []
        probe = self._budget.averages(evidence)
        positions = self._positions().unsqueeze(1)
        for layer in sorted(self._readers):
            marks, table = self._marks.get(layer), self._new_table([layer], probe)
            found.append(table.ranks(positions, marks, self._newest, None, (layer,)).mean(1))
        return torch.stack(found, dim=1)

    def _build(self, rows: Tensor, former: dict[int, int] | None = None) -> None:
        """Make the tables and storages for budgets [B, K].

        Layers that stood in one table so far, or in none, and get the same budgets share one.

        Args: former: KV layer -> the number of that table; None: as they stand.
        """
        former = self._table_numbers() if former is None else former
        self._tables, self._table, self._storage = [], {}, {}
        self._rows = rows
        alike: dict[tuple[int, ...], list[int]] = {}
        for column, layer in enumerate(sorted(self._readers)):
            window = self._opening.window(self._readers[layer])
            own = rows[:, column]
            if not self._ranking.grows and window < self._opening.rows:
                own = own.clamp(max=max(1, window - 1))
            alike.setdefault((former.get(layer, 0), window, *own.tolist()), []).append(layer)
        for (_, _, *budgets), layers in alike.items():
            table = self._new_table(layers, torch.tensor(budgets))
            self._tables.append(table)
            for layer in layers:
                self._table[layer] = table
                self._storage[layer] = self._opening.storage(table.capacity, self._heads)

    def _table_numbers(self) -> dict[int, int]:
        """KV layer -> the number of its table; empty before there are any."""
        return {layer: self._tables.index(table) for layer, table in self._table.items()}

    def _new_table(self, layers: list[int], budgets: Tensor) -> Table:
        ranking, opening = self._ranking, self._opening
        capacity = int(budgets.max()) + (opening.rows - self._prompt if ranking.grows else 1)
        return Table(
            ranking,
            layers,
            budgets,
            min(capacity, opening.rows),
            heads=self._heads,
            scored=ranking.voters(prompt=False) is not None,
            device=opening.device,
        )

    def _settle(self, layer: int) -> None:
        """Keep of a prompt's KV layer what its budget allows."""
        k, v = (by_head(x, self._heads) for x in self._fresh.pop(layer))
        held = Held(k, v, self._positions().unsqueeze(1), self._marks.pop(layer, None))
        self._install(layer, held, self._lengths)

    def _install(self, layer: int, rows: Held, lengths: Tensor) -> None:
        """Copy the best of so many rows [B] (on the CPU) into the layer's own slots."""
        table = self._table[layer]
        chosen = table.choose(layer, rows.positions, rows.scores, self._newest, self._window(table))
        table.install(layer, chosen, rows.positions, rows.scores)
        counts = torch.minimum(table.budgets, lengths)
        self._storage[layer].fill(chosen.rows(rows.k), chosen.rows(rows.v), counts)

    def _merge(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep of a turn, and of what was held, what the budget allows."""
        table = self._table[layer]
        marks, scores = self._marks.pop(layer, None), table.scores_at(layer)
        fresh = None
        if marks is not None and scores is not None:
            scores[..., : table.high] += marks[..., : table.high]
            fresh = marks[..., table.high :]
        window = self._window(table)
        slots = table.merge(layer, self._positions(), fresh, self._newest, window)
        self._storage[layer].put(slots, k, v)

    def _tally(self, kv: int, grown: Tensor) -> None:
        if self._stepping():
            scores = self._table[kv].scores_at(kv)
            if scores is not None:
                scores[..., : grown.shape[-1]] += grown
            return
        if self._seen:  # who reads before the layer writes sees none of a turn's own rows
            rows = self._table[kv].high + self._step.rows
            grown = F.pad(grown, (0, rows - grown.shape[-1]))
        known = self._marks.get(kv)
        self._marks[kv] = grown if known is None else known + grown

    def _divide_anew(self) -> None:
        """Give every layer a new budget by what the steps since the last one showed."""
        held = {layer: self._held_rows(layer) for layer in self._table}
        rows = self._budget.rows(self._evidence())
        self._measures.reset()
        self._build(rows)
        for layer, before in held.items():
            counts = (before.positions != EMPTY).sum(-1)[:, 0].cpu()
            self._install(layer, before, counts)
        for table in self._tables:
            table.recount()

    def _held_rows(self, layer: int) -> Held:
        table = self._table[layer]
        scores = table.scores_at(layer)
        k, v = self._storage[layer].get(table.high)
        scores = None if scores is None else scores[..., : table.high]
        return Held(k, v, table.at(layer)[..., : table.high], scores)

    def _stepping(self) -> bool:
        return bool(self._seen) and self._step.rows == 1

    def _measuring(self) -> bool:
        return self._budget.importance is not None and (
            not self._seen or self._budget.refresh is not None
        )

    def _window(self, table: Table) -> int | None:
        """Rows back from the newest that a layer of this table can still read; None: all."""
        window = self._opening.window(self._readers[table.layers[0]])
        return window if window < self._opening.rows else None

    def _positions(self) -> Tensor:
        """The positions [B, T] of the pass's rows."""
        return self._step.places(self._opening.batch, self._opening.device)
