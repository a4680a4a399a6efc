"""In what order layers run when some read keys from above them. Pure Python.

Source: arXiv 2410.14442 and the code published with it.
"""

from __future__ import annotations

from typing import NamedTuple

from kvlab.methods.decoder.config import DecoderConfig


class Segment(NamedTuple):
    """Layers start..stop-1. `cyclic`: they are run in several passes before the next begin."""

    start: int
    stop: int
    cyclic: bool


def segments(config: DecoderConfig) -> tuple[Segment, ...]:
    """Cut the layers into runs, bottom-up.

    A layer that reads upward opens a cyclic segment up to the layer it reads, which grows while a
    layer inside reads higher still. What lies between such segments is run once.
    """
    kv_of = config.kv_of
    found: list[Segment] = []
    begun = layer = 0
    while layer < config.layers:
        if kv_of[layer] <= layer:
            layer += 1
            continue
        if begun < layer:
            found.append(Segment(begun, layer, cyclic=False))
        begun, top = layer, kv_of[layer]
        while layer <= top:
            top = max(top, kv_of[layer])
            layer += 1
        found.append(Segment(begun, layer, cyclic=True))
        begun = layer
    if begun < config.layers:
        found.append(Segment(begun, config.layers, cyclic=False))
    return tuple(found)


def exit_layer(config: DecoderConfig) -> int | None:
    """Return the layer from which on only a prompt's last row matters; None where there is none.

    It is the last that owns keys and values: of its prompt rows the cache wants those alone, and no
    later layer gives the cache anything. None where that layer is run in passes.
    """
    last = max(config.kv_of)
    if any(part.cyclic and part.start <= last < part.stop for part in segments(config)):
        return None
    return last


def passes_of(config: DecoderConfig, rows: int, passes: int | None = None) -> int:
    """Return how often a cyclic segment is run over so many rows.

    As many passes as rows give exactly what one row after another gives, so more are never run: a
    decode step takes one. `passes` stands in for the model's own number.
    """
    if passes is None:
        sharing = config.sharing
        passes = 1 if sharing is None else sharing.forward_passes + sharing.backward_passes
    return min(passes, rows)


def runs_by_row(config: DecoderConfig, passes: int | None = None) -> bool:
    """Whether the decoder takes one row after another, as its sharing may ask for.

    A number of passes that is given stands in for that, too.
    """
    return passes is None and config.sharing is not None and config.sharing.sequential
