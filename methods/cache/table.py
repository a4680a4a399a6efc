"""Which rows lie in which slots: the table of KV layers that have the same budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.ranking import Ranking, Rows, ranked, replaced


class Held(NamedTuple):
    """Rows [B, H, S] of one KV layer to choose among: see `Keys` and `Rows`."""

    k: Tensor
    v: Tensor
    positions: Tensor
    scores: Tensor | None


class Chosen:
    """The rows [B, H or 1, n] of a layer that stay, in the order of their positions.

    `index` may name any row where `held` is false: such entries come last.
    """

    def __init__(self, index: Tensor, held: Tensor) -> None:
        self.index, self.held = index, held

    def rows(self, x: Tensor) -> Tensor:
        """Gather [B, H, S, D] into [B, H, n, D]."""
        index = self.index.expand(len(x), x.shape[1], -1).unsqueeze(-1)
        return x.gather(2, index.expand(-1, -1, -1, x.shape[-1]))

    def of(self, x: Tensor, empty: float) -> Tensor:
        """Gather [B, H or 1, S] into [B, H or 1, n]."""
        heads = max(x.shape[1], self.index.shape[1])
        found = x.expand(-1, heads, -1).gather(2, self.index.expand(-1, heads, -1))
        return found.masked_fill(~self.held, empty)


def by_head(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values [B, H_kv, S, D] for every head that holds rows of its own."""
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


class Table:
    """Positions, and what rows scored, in the slots of KV layers whose budgets are the same.

    All steps on it are made for all its layers, samples and heads at once. Rows that all heads and
    layers keep alike stand in it once.

    Args:
        budgets: [B] int64 on the CPU, past rows that each sample keeps.
        rows: slots of each sample.
        heads: that the layers hold rows for.
        scored: rows are ranked by scores that decode steps add to.

    Attributes:
        low, high: slots in use in the emptiest sample; and in the fullest, all among the first.
        frozen: steps read all slots, so that one is like the other. whole: each of them holds a
            row of every sample from the next step on.
        slots: [n, B, H or 1, 1], where this step's row goes.
    """

    def __init__(
        self,
        ranking: Ranking,
        layers: Sequence[int],
        budgets: Tensor,
        rows: int,
        *,
        heads: int,
        scored: bool,
        device: torch.device,
    ) -> None:
        self.ranking, self.capacity, self.heads = ranking, rows, heads
        self.layers, self.apart = tuple(layers), ranking.by_head or ranking.by_layer
        self.place_of = {layer: i if self.apart else 0 for i, layer in enumerate(layers)}
        copies = len(layers) if self.apart else 1
        shape = (copies, len(budgets), heads if ranking.by_head else 1, rows)
        self.positions = torch.full(shape, EMPTY, device=device)
        self.scores = torch.zeros(shape, device=device) if scored else None
        self.budgets, self.budget = budgets, budgets.to(device)[:, None, None]
        usable = torch.full_like(budgets, rows) if ranking.grows else (budgets + 1).clamp(max=rows)
        self.usable = int(usable.min())
        shut = torch.arange(rows) >= usable[:, None, None]
        self.shut = shut.to(device) if bool(shut.any()) else None
        self._usable = None if self.shut is None else usable.to(device)
        self._stays = ranking.stays(self.budget[:, 0, 0])
        self.keeps = int(budgets.max())
        self.low = self.high = 0
        self.frozen = self.whole = False
        self.slots = self.positions[..., :1]
        self.count = torch.zeros(len(budgets), 1, 1, dtype=torch.long, device=device)
        self.begin()

    def begin(self) -> None:
        """Forget what was worked out for the last pass."""
        self._chosen: Chosen | None = None
        self._merged: Tensor | None = None
        self._readable: dict[tuple[int, int], Tensor] = {}
        self._standing: dict[int, tuple[Tensor, Tensor]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What a saved cache keeps of it."""
        found = {"positions": self.positions, "count": self.count}
        return found if self.scores is None else {**found, "scores": self.scores}

    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors().values())

    @property
    def reach(self) -> int:
        """Slots, from the first, that a step reads."""
        return self.capacity if self.frozen else self.high

    def exact(self) -> bool:
        """Whether all slots that a step reads hold a row of every sample."""
        return self.whole if self.frozen else self.low == self.high

    def freeze(self) -> None:
        """Read all slots from the next step on."""
        self.frozen, self.whole = True, min(self.low + 1, self.usable) == self.capacity

    def advance(self, steps: int) -> None:
        """Count rows of steps."""
        self.low = min(self.low + steps, self.usable)
        self.high = min(self.high + steps, self.capacity)

    def at(self, layer: int) -> Tensor:
        """The positions [B, H or 1, C] of a layer."""
        return self.positions[self.place_of[layer]]

    def scores_at(self, layer: int) -> Tensor | None:
        return None if self.scores is None else self.scores[self.place_of[layer]]

    def choose(
        self,
        layer: int,
        positions: Tensor,
        scores: Tensor | None,
        newest: Tensor,
        window: int | None,
    ) -> Chosen:
        """Choose among rows [B, H or 1, S] of a layer which stay.

        Args:
            scores: [B, H, S]. newest: [B, 1, 1].
            window: rows that no later query can read leave first; None: all can be read.
        """
        if self._chosen is not None:
            return self._chosen
        ranks = self.ranks(positions, scores, newest, window, (layer,))
        rows = ranks.shape[-1]
        keep = min(self.keeps, rows)
        best = ranks.sort(dim=-1, descending=True, stable=True)
        index, found = best.indices[..., :keep], best.values[..., :keep]
        held = (found > float("-inf")) & (torch.arange(keep, device=ranks.device) < self.budget)
        standing = positions.expand_as(ranks).gather(-1, index)
        order = standing.masked_fill(~held, torch.iinfo(standing.dtype).max).argsort(-1)
        chosen = Chosen(index.gather(-1, order), held.gather(-1, order))
        if not self.apart:
            self._chosen = chosen
        return chosen

    def ranks(
        self,
        positions: Tensor,
        scores: Tensor | None,
        newest: Tensor,
        window: int | None,
        layers: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Rank rows [..., B, H or 1, S]; -inf where there is none.

        Args: layers: whose rows they are, see `Rows`; None: all of the table's.
        """
        if scores is None and self.ranking.voters(prompt=True) is not None:
            # Nobody read them: in one pass over a prompt, layers below do not find them yet.
            shape = (*positions.shape[:-2], self.heads, positions.shape[-1])
            scores = torch.zeros(shape, device=positions.device)
        rows = self._rows(positions, scores, newest, layers or self.layers)
        return ranked(self.ranking, rows, window)

    def _rows(
        self, positions: Tensor, scores: Tensor | None, newest: Tensor, layers: tuple[int, ...]
    ) -> Rows:
        return Rows(positions, scores, newest, self.budget, self.heads, layers)

    def install(self, layer: int, chosen: Chosen, positions: Tensor, scores: Tensor | None) -> None:
        """Enter the rows that stay, of a layer whose slots are empty."""
        rows = chosen.index.shape[-1]
        self.at(layer)[..., :rows] = chosen.of(positions, EMPTY)
        own = self.scores_at(layer)
        if own is not None and scores is not None:
            own[..., :rows] = chosen.of(scores, 0.0)

    def fill(self, counts: Tensor) -> None:
        """Hear that so many rows [B] (on the CPU) were installed for each sample."""
        self.low, self.high = int(counts.min()), int(counts.max())
        self.count.copy_(counts[:, None, None])

    def once(self, layer: int, held: Tensor) -> Tensor:
        """Positions [B, S] of rows [B, 1, S]: one object where layers keep alike, so one mask.

        By how many there are: a layer may be read without a turn's rows, and again with them.
        """
        return self._readable.setdefault((self.place_of[layer], held.shape[-1]), held[:, 0])

    def step(self, newest: Tensor, window: int | None) -> None:
        """Take a slot for one new row of each sample, position `newest` [B, 1, 1]."""
        shape = (*self.positions.shape[:-1], 1)
        if self.ranking.grows:
            self.count += 1
            self.slots = (self.count - 1).expand(shape)
            self.positions.scatter_(-1, self.slots, newest.expand(shape))
            if self.scores is not None:
                self.scores.scatter_(-1, self.slots, 0.0)
        else:
            rows = self._rows(self.positions, self.scores, newest - 1, self.layers)
            self.slots = replaced(self.ranking, rows, newest, self._stays, window, self._usable)
        self.advance(1)

    def merge(
        self,
        layer: int,
        positions: Tensor,
        fresh_scores: Tensor | None,
        newest: Tensor,
        window: int | None,
    ) -> Tensor:
        """Enter a turn's rows, position [B, T]; return their slots [B, H or 1, T], -1: it left.

        Args: fresh_scores: [B, H, T].
        """
        if self._merged is not None:
            return self._merged
        own, scores = self.at(layer), self.scores_at(layer)
        fresh = positions.unsqueeze(1).expand(-1, own.shape[1], -1)
        joined = torch.cat((own, fresh), dim=-1)
        if self.ranking.grows:
            kept = joined != EMPTY
        else:
            both = None
            if scores is not None and fresh_scores is not None:
                both = torch.cat((scores, fresh_scores), dim=-1)
            ranks = self.ranks(joined, both, newest, window, (layer,))
            order = ranks.argsort(dim=-1, descending=True, stable=True)
            rank = torch.empty_like(order)
            every = torch.arange(rank.shape[-1], device=rank.device)
            rank.scatter_(-1, order, every.expand_as(rank))
            kept = (rank < self.budget) & (joined != EMPTY)
        held = own.masked_fill(~kept[..., : self.capacity], EMPTY)
        stays = kept[..., self.capacity :]
        free = held == EMPTY
        if self.shut is not None:
            free = free & ~self.shut
        open_slots = free.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        number = (stays.cumsum(-1) - 1).clamp(0, self.capacity - 1)
        slots = open_slots.gather(-1, number).masked_fill(~stays, -1)
        self._enter(own, held, slots, fresh)
        if scores is not None and fresh_scores is not None:
            self._enter(scores, scores.clone(), slots, fresh_scores)
        if not self.apart:
            self._merged = slots
        return slots

    def _enter(self, table: Tensor, held: Tensor, slots: Tensor, fresh: Tensor) -> None:
        """Write `held` with the fresh values in their slots; slot -1 takes none."""
        spare = torch.cat((held, held[..., :1]), dim=-1)
        places = torch.where(slots < 0, self.capacity, slots)
        table.copy_(spare.scatter(-1, places, fresh.to(spare.dtype))[..., :-1])

    def recount(self) -> None:
        """Find how full the slots are; asks the device."""
        held = self.positions != EMPTY
        counts = held.sum(-1)
        self.low = int(counts.min())
        last = torch.arange(1, self.capacity + 1, device=held.device) * held
        self.high = int(last.max())
        self.count = counts[0].amax(1, keepdim=True).unsqueeze(-1)

    def make_room(self, rows: int | Tensor, least: int, newest: Tensor) -> None:
        """Free slots until so many rows (or [B]) fit the budget; at least `least` stay."""
        ranks = self.ranks(self.positions, self.scores, newest, None)
        order = ranks.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(-1, order, torch.arange(self.capacity, device=rank.device).expand_as(rank))
        rows = rows.view(-1, 1, 1) if isinstance(rows, Tensor) else rows
        self.positions.masked_fill_(rank >= (self.budget - rows).clamp_min(least), EMPTY)

    def standing(self, layer: int, fresh: Tensor | None) -> tuple[Tensor, Tensor]:
        """Number the rows that are held, in the order of their positions.

        Args: fresh: [B, T], positions of rows beside those in the slots.

        Returns: of the newest T rows [B, T] (one without `fresh`), of all rows [B, (H,) S].
        """
        known = self._standing.get(self.place_of[layer])
        if known is not None:
            return known
        held = self.at(layer)[..., : self.reach]
        if fresh is not None:
            held = torch.cat((held, fresh.unsqueeze(1).expand(-1, held.shape[1], -1)), dim=-1)
        empty = (held == EMPTY).sum(-1, keepdim=True)
        numbers = (held.argsort(-1).argsort(-1) - empty).clamp_min(0)
        keys = numbers if numbers.shape[1] > 1 else numbers[:, 0]
        if fresh is None:
            queries = (self.reach - 1 - empty[:, 0]) if held.shape[-1] else empty[:, 0]
        else:
            queries = numbers[:, 0, -fresh.shape[1] :]
        self._standing[self.place_of[layer]] = queries, keys
        return queries, keys
