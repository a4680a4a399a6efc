"""What a CUDA graph does to memory, on the CPU.

Capturing leaves nothing behind; a replay runs the same calls on the same memory, whatever Python
has made of it since. Each aten call is recorded with its tensors; a replay makes it again and
copies what it returns to where the first one had put it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
FROM_HOST = {"lift_fresh", "lift", "_pin_memory"}
ASKS = {"cpu", "item", "tolist", "numpy", "pin_memory", "__bool__", "__int__", "__index__"}
POISON = 0xFF
"""In every byte: not a number, or -1."""


class RefusedError(RuntimeError):
    """No graph can hold this."""


def capture(action: Callable[[], object], most: int | None = None) -> Recording:
    """Capture a call as `kvlab.methods.decoder.graph.capture` does.

    Args: most: refuse the calls behind so many.

    Raises:
        RefusedError: no graph can hold the call.
    """
    recording = Recording(most)
    try:
        with torch.inference_mode(), _Host(), recording:
            action()
    finally:
        recording.undo()
    return recording


class Recording(TorchDispatchMode):
    """The aten calls of one capture."""

    def __init__(self, most: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        refuse(func, (args, kwargs))
        if self.most is not None and len(self.calls) == self.most:
            raise RefusedError(f"{func}: one call too many")
        given = {at(tensor) for tensor in tensors((args, kwargs))}
        self._hold(written(func, args, kwargs))
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            if at(tensor) not in given:
                self.made[at(tensor)] = tensor.untyped_storage()
        self.calls.append((func, args, kwargs, out))
        return out

    def launch(self, kernel: Callable[..., object], args: Any, kwargs: Any) -> None:
        """Record a kernel's launch; it may write to whatever it is given."""
        self._hold((args, kwargs))
        kernel(*args, **kwargs)
        self.calls.append((kernel, args, kwargs, None))

    def _hold(self, given: Any) -> None:
        """Remember what stands in tensors that are about to be written."""
        for tensor in tensors(given):
            if at(tensor) not in self.made and at(tensor) not in self.before:
                storage = tensor.untyped_storage()
                self.before[at(tensor)] = storage, storage.clone()  # type: ignore[no-untyped-call]

    def undo(self) -> None:
        """Leave memory as if nothing had run; what was made holds nothing of use."""
        for storage, held in self.before.values():
            storage.copy_(held)
        for storage in self.made.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)

    @torch.inference_mode()
    def replay(self) -> None:
        """Make all calls again."""
        for func, args, kwargs, out in self.calls:
            for kept, fresh in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != fresh.data_ptr():
                    kept.copy_(fresh)


class _Host(TorchFunctionMode):
    """Refuses what asks for numbers, also where a CPU would not have to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ASKS:
            raise RefusedError(f"{func.__name__}: asks the device")
        return func(*args, **(kwargs or {}))


def refuse(func: Any, given: Any) -> None:
    """Refuse what waits for the device, or brings numbers from the host."""
    name = func._schema.name.removeprefix("aten::")
    if name in WAITS | FROM_HOST:
        raise RefusedError(f"{name}: not while a graph is captured")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [t for t in tensors(given[0][1]) if t.dtype in (torch.bool, torch.uint8)]
        if masks:
            raise RefusedError(f"{name}: a mask asks how many rows it has")
    if name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor"):
        raise RefusedError(f"{name}: the output's size is on the device")
    devices = {tensor.device.type for tensor in tensors(given) if tensor.dim()}
    if len(devices) > 1:
        raise RefusedError(f"{name}: between devices")


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that a call writes to."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return found


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def at(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
