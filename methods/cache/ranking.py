"""The interface of an eviction that ranks rows: those of the lowest rank leave first."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY
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

    @abstractmethod
    def rank(self, rows: Rows) -> Tensor:
        """Return [..., B, H or 1, S] float32; inf on rows that stay whatever comes."""

    def in_slots(self) -> InSlots:
        return InSlots(self, None)


def ranked(ranking: Ranking, rows: Rows, window: int | Tensor | None) -> Tensor:
    """Rank rows [..., B, H or 1, S]; -inf where there is none.

    Args: window: rows that no later query can read leave first; None: all can be read.
    """
    ranks = ranking.rank(rows)
    if window is not None:
        lowest = torch.finfo(ranks.dtype).min
        ranks = ranks.masked_fill(rows.positions <= rows.newest + 1 - window, lowest)
    return ranks.masked_fill(rows.positions == EMPTY, float("-inf"))


def by_age(rows: Rows) -> Tensor:
    """The newest ranks highest. Exact to 2^24 positions."""
    return rows.positions.to(torch.float32)


class Newest(Ranking):
    """The newest rows rank highest: a window, or where the budget is all there is, full attention.

    For what a `Policy` cannot do: budgets of each sample, storages that a row's number alone does
    not address.
    """

    def rank(self, rows: Rows) -> Tensor:
        return by_age(rows)


class All(Newest):
    """Every row stays."""

    grows = True
