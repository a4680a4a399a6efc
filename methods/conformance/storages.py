"""The bytes of a live cache: found by looking, not by asking it."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator

from torch import Tensor, nn


def bytes_of(holder: object) -> int:
    """Bytes of the storages of every tensor that an object holds, however deep."""
    storages = {}
    for tensor in _tensors(holder):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(holder: object) -> Iterator[Tensor]:
    """Those of modules and of classes aside."""
    skipped = (type, types.ModuleType, types.FunctionType, types.CodeType, nn.Module)
    seen: set[int] = set()
    waiting: list[object] = [holder]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, skipped):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        else:
            waiting += gc.get_referents(thing)
