"""The interface of an eviction that ranks rows: those of the lowest rank leave first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.evict import Stays, evict, rank, take, unread_last
from kvlab.methods.budget.budget import Budget
from kvlab.methods.cache.opening import Eviction, Opening
from kvlab.methods.decoder.config import DecoderConfig

if TYPE_CHECKING:
    from kvlab.methods.cache.evicting import EvictingCache
    from kvlab.methods.cache.pool import PoolCache


class InSlots(NamedTuple):
    """How rows stand in slots: which leave, and how many stay (None: as the method says)."""

    ranking: Ranking
    budget: Budget | None


class Rows(NamedTuple):
    """Rows of one or several KV layers, in any order.

    positions: [..., B, H or 1, S], EMPTY on rows that hold nothing; their rank does not count.
    scores: [..., B, H, S] float32, what `tally` added up for each row; None where nothing was.
    newest: [B, 1, 1], the position of each sample's newest row.
    budget: [B, 1, 1], past rows that each sample may keep.
    heads: that the cache holds rows for.
    layers: the KV layers of the leading dimension; of one, or of rows that all share, without it.
    """

    positions: Tensor
    scores: Tensor | None
    newest: Tensor
    budget: Tensor
    heads: int
    layers: tuple[int, ...]


class Ranking(Eviction):
    """Ranks the rows of each KV layer; an `EvictingCache` keeps those of the highest rank.

    A prompt is read in full, then cut to its budget; afterwards every new row takes the slot of the
    row that ranks lowest. An eviction value names it as its implementation; made as `cls(params)`.

    Attributes:
        by_head: KV heads keep rows of their own, ranked by scores of their own.
        by_layer: KV layers do, their heads together; else those with the same budget keep alike.
        grows: rows that come after the prompt always stay: `rank` decides over the prompt alone.
        in_cache: positions count the rows that are held, instead of those of the text.
        by_turn: room is made before a turn, see `Cache.reserve`; nothing leaves within.
    """

    by_head: bool = False
    by_layer: bool = False
    grows: bool = False
    in_cache: bool = False
    by_turn: bool = False

    def open(self, opening: Opening, budget: Budget | None = None) -> EvictingCache:
        """Return an empty cache. Args: budget: None: as the method says."""
        from kvlab.methods.cache.evicting import EvictingCache

        return EvictingCache(self, opening, budget=budget)

    def pooled(self) -> type[PoolCache]:
        """The cache of a server's requests."""
        from kvlab.methods.cache.pool import PoolCache

        return PoolCache

    def heads(self, config: DecoderConfig) -> int:
        """Heads that the cache holds rows for; a multiple of `config.kv_heads`."""
        return config.kv_heads

    def voters(self, prompt: bool) -> slice | None:
        """Query rows of a pass whose attention `tally` wants, as `Cache.key_mass_rows` says it.

        Args: prompt: whether it is the first pass.
        """
        return None

    def tally(self, mass: Tensor, heads: int) -> Tensor:
        """Turn a layer's key mass [B, H_q, S] into what its rows' scores grow by [B, heads, S].

        The mass of the query heads that read one KV head is added up.
        """
        return torch.unflatten(mass, 1, (heads, -1)).sum(2)

    def stays(self, budget: Tensor) -> Stays | None:
        """What never leaves, where that and one number of each row are all that its rank is.

        The number is its score where rows have any; what is `known` of it; else its position. A
        decode step then needs no ranks. None: `rank` says what they are.

        Args: budget: [B] or [n, B], past rows that each sample may keep, of n KV layers.
        """
        return None

    def known_of(self, layers: tuple[int, ...]) -> Tensor | None:
        """What a row at each position is worth [n or 1, B, P] float32 in KV layers; see `stays`."""
        return None

    def rank(self, rows: Rows) -> Tensor:
        """Return [..., B, H or 1, S]; inf on rows that stay whatever comes."""
        stays = self.stays(rows.budget[..., 0, 0])
        if stays is None:
            raise NotImplementedError(
                f"{type(self).__name__} says neither what stays nor its ranks"
            )
        return rank(rows.positions, rows.newest + 1, stays, rows.scores, self.known(rows))

    def known(self, rows: Rows) -> Tensor | None:
        """`known_of` these rows, as `kvlab.kernels.evict` takes it."""
        found = self.known_of(rows.layers)
        if found is None:
            return None
        return found[0] if rows.positions.dim() == 3 else found.expand(len(rows.positions), -1, -1)

    def in_slots(self) -> InSlots:
        return InSlots(self, None)


def ranked(ranking: Ranking, rows: Rows, window: int | Tensor | None) -> Tensor:
    """Rank rows [..., B, H or 1, S]; -inf where there is none.

    Args: window: rows that no later query can read leave first; see `Stays`.
    """
    return unread_last(ranking.rank(rows), rows.positions, rows.newest + 1, window)


def replaced(
    ranking: Ranking,
    rows: Rows,
    newest: Tensor,
    stays: Stays | None,
    window: int | Tensor | None,
    usable: Tensor | None,
) -> Tensor:
    """Enter a new row of each sample in place of that which ranks lowest; return the slots.

    In place: positions [n, B, H or 1, C] and scores, as `kvlab.kernels.evict.evict` does.

    Args:
        rows: the past. newest: [B, 1, 1], positions of the new rows.
        stays: as the ranking says it. window, usable: see `Stays`.
    """
    if stays is None:
        ranks = ranked(ranking, rows, window)
        return take(ranks, rows.positions, newest, usable, rows.scores)
    stays = stays._replace(window=window, usable=usable)
    return evict(
        rows.positions, newest.flatten(), stays, scores=rows.scores, known=ranking.known(rows)
    )


class Newest(Ranking):
    """The newest rows rank highest: a window, or where the budget is all there is, full attention.

    For what a `Policy` cannot do: budgets of each sample, storages that a row's number alone does
    not address.
    """

    def stays(self, budget: Tensor) -> Stays:
        return Stays()


class All(Newest):
    """Every row stays."""

    grows = True
