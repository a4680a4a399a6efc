"""How a prompt becomes a cache: in how many passes, and through how many layers. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from kvlab.methods.axis import Method, Range, Value
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.segments import exit_layer


@dataclass(frozen=True, slots=True)
class AutomaticPrefill:
    """What the model and the cache call for."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """Settings of a prefill; None leaves one to the model and the cache.

    Attributes:
        early_exit: run the layers above the last KV layer for the last prompt token only. None:
            where there are such layers and the cache does not want to see every row.
        passes: how often layers that read keys from above them are run over a prompt. None: as in
            training.
    """

    early_exit: bool | None = None
    passes: Annotated[int, Range(1, 1024, log=True)] | None = None


def prefill_of(method: Method | None) -> Prefill:
    """Return the prefill that a method asks for; None asks for the automatic one."""
    choice = method.choices.get("prefill") if method else None
    if choice is None or not isinstance(choice.params, Prefill):
        return Prefill()
    return choice.params


def check(params: Prefill, config: DecoderConfig | None) -> Iterator[str]:
    """Yield what makes these params impossible, for the decoder whose past it is."""
    if params == Prefill():
        yield "says nothing without early_exit or passes: leave it out"
    if params.early_exit and config is not None and exit_layer(config) is None:
        last = max(config.kv_of)
        yield (
            f"early_exit: layer {last}, the last that owns keys and values, is read from below and "
            "run in passes, so no layer can be left out: remove early_exit"
        )


def composes(method: Method, config: DecoderConfig | None) -> Iterator[str]:
    """Yield which of the method's choices wants to see the rows that an early exit leaves out."""
    if not prefill_of(method).early_exit:
        return
    for choice in method.choices.values():
        if choice.value.observes_all:
            yield (
                f"early_exit: '{choice.value.name}' decides by every row of every layer, so no "
                "layer can be left out: remove early_exit"
            )


ENTRIES = (
    Value(
        axis="prefill",
        name="automatic_prefill",
        summary="a prompt is read as the model was trained, leaving out what nothing reads",
        params=AutomaticPrefill,
        default=True,
    ),
    Value(
        axis="prefill",
        name="prefill",
        summary="a prompt is read in `passes` passes, with or without early exit",
        params=Prefill,
        paper="2405.05254",
        check=check,
        composes=composes,
        sources=("kvlab.methods.prefill",),
    ),
)
