"""The named ways of sharing keys and values across layers: which layer each layer reads.

Layers count from 0. A *core* is a run of layers that all read one of them, the target; every other
layer reads itself. Pure Python. Source: arXiv 2410.14442.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from kvlab.methods.axis import MethodError

Layout = Literal[
    "pizza_bottom", "pizza_top", "pizza_middle",
    "sandwich_bottom", "sandwich_top", "sandwich_middle",
    "lasagna_bottom", "lasagna_top", "lasagna_middle",
]  # fmt: skip
"""Where the cores lie, and which layer of a core is its target.

pizza: one core at the top; sandwich: one in the middle; lasagna: all layers in cores of one size.
"""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Core(NamedTuple):
    """Layers first..last, which share the keys and values of one."""

    first: int
    last: int


def kv_map(layout: Layout, layers: int, kv_layers: int) -> tuple[int, ...]:
    """Return the layer that each of `layers` layers reads, of which `kv_layers` are distinct.

    Raises:
        MethodError: more KV layers than layers, or none.
    """
    partition, _, target = layout.partition("_")
    if not 1 <= kv_layers <= layers:
        raise MethodError(
            f"kv_layers: must be from 1 to the decoder's {layers} layers, found {kv_layers}"
        )
    kv_of = list(range(layers))
    for first, last in cores(partition, layers, kv_layers):
        middle = (first + last) // 2
        read = {"bottom": first, "top": last, "middle": middle}[target]
        kv_of[first : last + 1] = [read] * (last - first + 1)
    return tuple(kv_of)


def cores(partition: str, layers: int, kv_layers: int) -> list[Core]:
    """Cut `layers` layers into cores; those in none keep their own keys and values.

    Where the cores of a lasagna cannot be of one size, core j begins at floor(j * layers / l).
    """
    if partition == "lasagna":
        begins = [j * layers // kv_layers for j in range(kv_layers + 1)]
        return [Core(a, b - 1) for a, b in pairwise(begins)]
    above = (kv_layers - 1) // 2 if partition == "sandwich" else 0
    return [Core(kv_layers - 1 - above, layers - 1 - above)]


def lckv_map(layers: int, warmup_layers: int) -> tuple[int, ...]:
    """Return LCKV's map: all layers but the warm-up layers read the top one of them.

    Half of the warm-up layers lie at the bottom (the larger half), half at the top.

    Raises:
        MethodError: no layer is left to be read.
    """
    if not 0 <= warmup_layers < layers:
        raise MethodError(
            f"warmup_layers: must be below the decoder's {layers} layers, found {warmup_layers}"
        )
    return kv_map("sandwich_top", layers, warmup_layers + 1)


def cla_map(layers: int, group: int, leading: int = 0) -> tuple[int, ...]:
    """Return CLA's map: from layer `leading` on, each `group` layers read their lowest.

    The last group has what is left.

    Raises:
        MethodError: fewer layers than a group has.
    """
    if not 0 <= leading < layers:
        raise MethodError(f"leading: must be below the decoder's {layers} layers, found {leading}")
    if not 1 <= group <= layers - leading:
        raise MethodError(
            f"group: must be at most the decoder's {layers - leading} layers from layer {leading} "
            f"on, found {group}"
        )
    return tuple(i if i < leading else i - (i - leading) % group for i in range(layers))


def yoco_map(layers: int, kv_layers: int | None = None) -> tuple[int, ...]:
    """Return YOCO's map: the upper layers read the topmost KV layer, one above the lower half.

    Args:
        layers: of the decoder.
        kv_layers: None is half of the layers and one.

    Raises:
        MethodError: more KV layers than layers.
    """
    return kv_map("pizza_bottom", layers, layers // 2 + 1 if kv_layers is None else kv_layers)


def keep_first(kv_of: Sequence[int]) -> tuple[int, ...]:
    """Return the map with layer 0 reading itself: one KV layer more where it read another."""
    return (0, *kv_of[1:])
