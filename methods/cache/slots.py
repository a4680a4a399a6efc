"""Storage of a decoder's past: preallocated rows per layer, written in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlab.kernels.attention import EMPTY, Rule
from kvlab.methods.axis import Method
from kvlab.methods.cache.interface import Cache, Extra, Keys, Step
from kvlab.methods.cache.policy import Policy
from kvlab.methods.decoder.config import DecoderConfig


@dataclass
class _Table:
    """The position of every slot, shared by the layers that have as many."""

    positions: Tensor
    view: Tensor | None = None


class SlotCache(Cache):
    """Keeps [B, H_kv, C, D] keys and values per layer; a full ring overwrites its oldest row.

    Prompts are left-padded, so all samples use the same slot for the same row of a step.
    """

    def __init__(
        self,
        config: DecoderConfig,
        policy: Policy,
        *,
        batch: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._policy = policy
        self._seen = 0
        self._rows = 0
        self._padded = False
        self._fresh: dict[int, Keys] = {}
        self._tables: dict[int, _Table] = {}
        self._layers: list[tuple[Tensor, Tensor, int]] = []
        for layer in range(config.layers):
            window = config.windows[layer] if config.windows else None
            capacity = min(policy.capacity(layer, tokens), window or tokens, tokens)
            shape = (batch, config.kv_heads, capacity, config.head_dim)
            k = torch.empty(shape, device=device, dtype=dtype)
            self._layers.append((k, torch.empty_like(k), capacity))
            if capacity not in self._tables:
                table = torch.full((batch, capacity), EMPTY, device=device)
                self._tables[capacity] = _Table(table)

    def rule(self, layer: int, own: Rule) -> Rule:
        return self._policy.rule(layer, own)

    def plan(self, step: Step) -> Extra | None:
        if step.positions is not None:
            self._rows = step.positions.shape[1]
            self._padded |= self._seen == 0
        for capacity, table in self._tables.items():
            if self._seen and step.positions is not None:
                slot = self._seen % capacity
                table.positions[:, slot : slot + 1] = step.positions
                table.view = table.positions[:, : self._seen + 1] if self._padded else None
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        keys, values, capacity = self._layers[layer]
        rows = k.shape[2]
        if self._seen == 0:
            self._rows = rows
            self._fresh[layer] = Keys(k, v, positions)
            kept = min(rows, capacity)
            slots = torch.arange(rows - kept, rows, device=k.device) % capacity
            keys[:, :, slots] = k[:, :, rows - kept :]
            values[:, :, slots] = v[:, :, rows - kept :]
            table = self._tables[capacity].positions
            if positions is None:
                table[:, slots] = torch.arange(rows - kept, rows, device=k.device)
            else:
                table[:, slots] = positions[:, rows - kept :]
            return
        slot = self._seen % capacity
        keys[:, :, slot : slot + 1] = k
        values[:, :, slot : slot + 1] = v

    def read(self, layer: int) -> Keys:
        if self._seen == 0:
            return self._fresh[layer]
        keys, values, capacity = self._layers[layer]
        held = min(self._seen + 1, capacity)
        return Keys(keys[:, :, :held], values[:, :, :held], self._tables[capacity].view)

    def observe(self, layer: int, before: Tensor, after: Tensor, key_mass: Tensor | None) -> None:
        self._fresh.pop(layer, None)

    def finish(self) -> None:
        self._seen += self._rows
        self._rows = 1

    def nbytes(self) -> int:
        storages = [t for k, v, _ in self._layers for t in (k, v)]
        storages += [table.positions for table in self._tables.values()]
        return sum(t.untyped_storage().nbytes() for t in storages)


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
        apply: eviction (budget and precision later); None is the full cache.
        batch: sequences. tokens: positions of the longest one at most, prompt included (blocks for
            a block decoder).
    """
    from kvlab.methods.axis import resolve

    choice = (apply or resolve({}))["eviction"]
    policy: Policy = choice.value.load()(choice.params)
    return SlotCache(config, policy, batch=batch, tokens=tokens, device=device, dtype=dtype)
