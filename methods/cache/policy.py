"""The interface of an eviction policy: which past rows a slot cache keeps."""

from __future__ import annotations

from abc import abstractmethod

from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Method
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import Eviction, Opening
from kvlab.methods.decoder.config import DecoderConfig


class Policy(Eviction):
    """Decides which rows each layer of a `SlotCache` keeps.

    An eviction value names it as its implementation; it is made as `cls(params)`, one instance per
    cache, and never sees a tensor: what stays depends on the number of a row alone. Rows are
    numbered from 0 with left padding counted, so a number means the same for all samples, and a
    decode step needs no word from the device.

    A choice that depends on content (attention mass, a learned score), or differs between samples
    or KV heads, is a `Ranking`; one that adds query rows is an `Eviction` that opens a `Cache` of
    its own.
    """

    def open(self, opening: Opening) -> Cache:
        from kvlab.methods.cache.slots import SlotCache

        return SlotCache(self, opening)

    def scoring(
        self, config: DecoderConfig, method: Method, passes: int | None = None
    ) -> Cache | None:
        from kvlab.methods.cache.ephemeral import one_pass

        return one_pass(config, self, passes)

    @abstractmethod
    def capacity(self, layer: int, rows: int) -> int:
        """Rows that KV layer `layer` holds at most while a sequence grows to `rows` rows.

        The cache holds fewer where the model's own window is smaller.
        """

    def slot(self, row: int, capacity: int) -> int:
        """The slot, of `capacity`, that row number `row` overwrites.

        Free slots are taken in order: row r < capacity goes to slot r. The default is a ring: the
        oldest row goes. The row that is overwritten is gone before the new row's query reads.
        """
        return row % capacity

    def rule(self, layer: int, own: Rule) -> Rule:
        """What a query of decoder layer `layer` may read; `own` is the model's rule.

        It must allow exactly what the slots would hold: a prompt is read in one pass, before
        anything is dropped, and a decode step without padding reads every held row unmasked.
        """
        return own
