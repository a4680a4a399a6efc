"""The caches of a pass that has no past: training and scoring."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvlab.kernels.attention import Rule
from kvlab.methods.cache.interface import Cache, Keys
from kvlab.methods.cache.opening import last_reads
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.segments import runs_by_row


class Reads(Protocol):
    """What narrows the rule that rows are read under."""

    def rule(self, layer: int, own: Rule) -> Rule:
        """What a query of decoder layer `layer` may read; `own` is the model's rule."""
        ...


def one_pass(
    config: DecoderConfig, policy: Reads | None = None, passes: int | None = None
) -> Cache:
    """Return the cache of one pass over whole sequences, as a decoder of `config` trains.

    Args:
        passes: as `Decoder.body` takes them.
        policy: whose rule the rows are read under: the pass then reads what a cache of that policy
            would have kept (see `Policy.rule`). None: the model's own rule.
    """
    if runs_by_row(config, passes):
        return GrowingCache(policy)
    return EphemeralCache(config, policy)


class _Rows(Cache):
    """Rows by KV layer, read under a policy's rule."""

    def __init__(self, policy: Reads | None = None) -> None:
        self._policy = policy
        self._rows: dict[int, Keys] = {}

    def read(self, layer: int) -> Keys | None:
        return self._rows.get(layer)

    def rule(self, layer: int, own: Rule) -> Rule:
        return own if self._policy is None else self._policy.rule(layer, own)

    def nbytes(self) -> int:
        return 0


class EphemeralCache(_Rows):
    """Hands each layer the rows of this very pass, and forgets them once they are read."""

    def __init__(self, config: DecoderConfig, policy: Reads | None = None) -> None:
        super().__init__(policy)
        self._ends = last_reads(config.kv_of)

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._rows[layer] = Keys(k, v, positions)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        """Let go of the rows that no later layer reads: without sharing, one layer is held."""
        for ended in self._ends.get(layer, ()):
            del self._rows[ended]


class GrowingCache(_Rows):
    """Keeps every row, joined anew for each, so that gradients reach all of the past.

    One row is given at a time. That makes a pass exactly what decoding is, and costs time and
    memory with the square of the length: the measure that passes in parallel are held to.
    """

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        assert positions is not None
        past = self._rows.get(layer)
        if past is not None and past.positions is not None:
            k, v = torch.cat((past.k, k), dim=2), torch.cat((past.v, v), dim=2)
            positions = torch.cat((past.positions, positions), dim=1)
        self._rows[layer] = Keys(k, v, positions)
