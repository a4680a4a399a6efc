"""SnapKV as a ranking: pooled votes of the end of the prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.cache.ranking import Ranking, Rows
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.eviction.snapkv.params import SnapKVParams


class SnapKV(Ranking):
    """vote(j) = sum over the last `window` queries of the attention that key j got from them.

    Votes are pooled over neighbours (zeros beyond the ends, always divided by the kernel); those
    for the window itself are left out first, since it stays anyway. Padding never votes, and never
    gets a vote.
    """

    params: SnapKVParams
    by_head = True
    grows = True

    def heads(self, config: DecoderConfig) -> int:
        return config.heads if self.params.heads == "query" else config.kv_heads

    def voters(self, prompt: bool) -> slice | None:
        return slice(-self.params.window, None) if prompt else None

    def tally(self, mass: Tensor, heads: int) -> Tensor:
        if self.params.votes == "mean":
            return super().tally(mass, heads)
        return mass  # pooled by query head first: see `rank`

    def rank(self, rows: Rows) -> Tensor:
        assert rows.scores is not None
        in_window = rows.positions > rows.newest - self.params.window
        outside = in_window | (rows.positions == EMPTY)
        votes = self._pool(rows.scores.masked_fill(outside, 0.0))
        if votes.shape[1] != rows.heads:
            votes = super().tally(votes, rows.heads)
        return votes.masked_fill(in_window, float("inf"))

    def _pool(self, votes: Tensor) -> Tensor:
        kernel = self.params.kernel
        if self.params.pooling == "max":
            return F.max_pool1d(votes, kernel, 1, kernel // 2)
        return F.avg_pool1d(votes, kernel, 1, kernel // 2)
