"""Sharing maps as the code published with the paper writes them: "0_1s_8_8".

One entry a layer: the number of the layer whose keys and values it reads, with an `s` where its
queries see a sliding window.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kvlab.methods.axis import MethodError

_ENTRY = re.compile(r"([0-9]{1,4})(s?)")


class LayerTypes(NamedTuple):
    """Attributes: kv_of: the layer each layer reads. windowed: whether through a sliding window."""

    kv_of: tuple[int, ...]
    windowed: tuple[bool, ...]


def read_layer_types(written: str) -> LayerTypes:
    """Read such a text.

    Raises:
        MethodError: an entry that is no layer's number.
    """
    kv_of: list[int] = []
    windowed: list[bool] = []
    for layer, entry in enumerate(written.split("_")):
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise MethodError(
                f"layers: entry {layer} is {entry[:20]!r}: must be the number of a layer, from 0, "
                "with an 's' behind it for a sliding window; entries are joined by '_'"
            )
        kv_of.append(int(found[1]))
        windowed.append(bool(found[2]))
    return LayerTypes(tuple(kv_of), tuple(windowed))


def write_layer_types(kv_of: Sequence[int], windowed: Sequence[bool] | None = None) -> str:
    """Return the text of a map; `windowed` None: no layer has a window."""
    flags = windowed or (False,) * len(kv_of)
    return "_".join(f"{kv}s" if flag else str(kv) for kv, flag in zip(kv_of, flags, strict=True))
