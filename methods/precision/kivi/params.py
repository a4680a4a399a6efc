"""KIVI: keys quantised per channel, values per token, the newest rows as they are (2402.02750)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from kvlab.methods.axis import Range, Value
from kvlab.methods.cache.sources import BY_RANK
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class KiviParams:
    """Attributes:
    bits: of a code. 4 by default: the authors advise 2 for models whose query heads have keys of
        their own, and 4 for grouped queries, which most checkpoints have now.
    group: numbers that share a scale and a minimum: slots of one key channel, channels of one
        value row. Head sizes below it are one group.
    residual: newest rows that stay in the model's dtype; a multiple of `group`.
    """

    bits: Literal[2, 4] = 4
    group: Annotated[int, Range(8, 1024, log=True, step=8)] = 32
    residual: Annotated[int, Range(8, 65536, log=True, step=8)] = 128

    def value_group(self, head_dim: int) -> int:
        """Channels of a value row that share a scale."""
        return min(self.group, head_dim)

    def slots(self, rows: int) -> int:
        """Slots of whole key groups that so many rows need."""
        return -(-rows // self.group) * self.group

    def recent(self, rows: int) -> int:
        """Rows that stay in the model's dtype where there is room for so many in all."""
        return min(self.residual, self.slots(rows))


def problems(params: KiviParams, head_dim: int | None) -> Iterator[str]:
    """Yield what makes these params impossible, for heads of this size where it is known."""
    if params.group % 8:
        yield f"group: must be a multiple of 8, to fill whole bytes, found {params.group}"
    if params.residual % params.group:
        yield (
            f"residual: must be a multiple of group ({params.group}), found {params.residual}: "
            "keys are quantised so many rows at a time, in whole groups"
        )
    if head_dim is not None and head_dim % params.value_group(head_dim):
        yield (
            f"group: must divide the head size ({head_dim}) or be no smaller than it, found "
            f"{params.group}"
        )


def check(params: KiviParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible, for the decoder whose past it is."""
    yield from problems(params, None if config is None else config.head_dim)


ENTRY = Value(
    axis="precision",
    name="kivi",
    summary="2 or 4 bit: keys per channel, values per token, the newest rows as they are",
    params=KiviParams,
    implementation="kvlab.methods.precision.kivi.storage:Kivi",
    cost="kvlab.methods.precision.kivi.cost",
    paper="2402.02750",
    check=check,
    # A row's number alone does not find it, so that even the full cache ranks.
    sources=("kvlab.methods.precision.kivi", *BY_RANK),
)
