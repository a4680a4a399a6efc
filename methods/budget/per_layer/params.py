"""An explicit budget for every layer: by hand, or as a calibrate job found it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.decoder.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class PerLayerParams:
    """Past rows of each layer that owns keys and values, from the bottom: one list of the two.

    Attributes:
        tokens: so many rows.
        shares: of the rows of a prompt.
    """

    tokens: tuple[Annotated[int, Range(1, 2**20)], ...] = ()
    shares: tuple[Annotated[float, Range(0.0001, 1.0)], ...] = ()

    def rows(self, prompt: int) -> tuple[int, ...]:
        """Rows of each layer for a prompt of so many."""
        return self.tokens or tuple(max(1, int(share * prompt)) for share in self.shares)

    def fixed(self, prompt: int) -> PerLayerParams:
        """Return the same with shares turned into rows."""
        return replace(self, tokens=self.rows(prompt), shares=())


def check(params: PerLayerParams, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible, for the decoder whose past it is."""
    if bool(params.tokens) == bool(params.shares):
        yield "give one of tokens and shares: a number for every layer that owns keys and values"
        return
    given = len(params.tokens or params.shares)
    if config is not None and given != len(config.kv_layers):
        yield (
            f"{'tokens' if params.tokens else 'shares'}: the model has {len(config.kv_layers)} "
            f"layers that own keys and values, found {given} numbers"
        )


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what is wrong with the numbers for the method's eviction."""
    tokens, least = method["budget"].params.tokens, least_rows(method)
    if tokens and min(tokens) < least:
        yield (
            f"tokens: {method['eviction'].value.name} keeps at least {least} rows in every layer, "
            f"found {min(tokens)} for layer {tokens.index(min(tokens))} of those that own keys"
        )


ENTRY = Value(
    axis="budget",
    name="per_layer",
    summary="a list: rows, or a share of the prompt, for every layer",
    params=PerLayerParams,
    implementation="kvlab.methods.budget.per_layer.budget:PerLayer",
    cost="kvlab.methods.budget.per_layer.cost",
    check=check,
    composes=composes,
    sources=("kvlab.methods.budget.amount", "kvlab.methods.budget.per_layer"),
)
