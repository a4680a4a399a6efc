"""A device that is not there: what runs on it is counted, and every wait for it is noticed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

Model = TypeVar("Model", bound=nn.Module)

NOWHERE = torch.device("meta")
"""How the device calls itself: no code has a branch of its own for it, as it may for a CPU."""
WAITS = {
    "aten::_local_scalar_dense": "a number is read (.item(), int(), bool(), an if)",
    "aten::is_nonzero": "a truth value is read",
    "aten::equal": "tensors are compared as a whole",
    "aten::nonzero": "places are counted (nonzero, a boolean index)",
    "aten::masked_select": "rows are picked by a mask",
    "aten::_unique2": "values are counted (unique)",
    "aten::repeat_interleave.Tensor": "repeats are added up",
}


class Away(Tensor):
    """A tensor on the device: its numbers are on the CPU, its code is told otherwise."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=NOWHERE, requires_grad=False,
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Away({self.numbers!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Counts operations while it is entered, and notices waits.

    Tensors that ask for the device are made on it.

    Attributes:
        counts: operations by name, views aside.
        waits: every time that the host waited for it, and for what.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_view(func):
            self.counts[func._schema.name] += 1
        if wait := _wait(func, args, kwargs):
            self.waits.append(wait)
        return _run(func, args, kwargs)


def send(model: Model) -> Model:
    """Return a copy of a model whose weights are on the device."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                away = nn.Parameter(Away(parameter.data), requires_grad=False)
                module._parameters[name] = away
    return model


def _wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    name = func._schema.name
    if not any(isinstance(leaf, Away) for leaf in _leaves(args)):
        return None
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        leaves = target is not None and torch.device(target) != NOWHERE
        return f"{name}: numbers are fetched (.cpu(), .tolist())" if leaves else None
    if name == "aten::copy_":
        leaves = isinstance(args[1], Away) and not isinstance(args[0], Away)
        return f"{name}: numbers are fetched into a tensor of the host" if leaves else None
    if name in ("aten::index", "aten::index_put_"):
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            return f"{name}: places are counted (a boolean index)"
        return None
    reason = WAITS.get(name) or WAITS.get(f"{name}.{func._overloadname}")
    return f"{name}: {reason}" if reason else None


def _leaves(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, list | tuple):
            yield from arg
        else:
            yield arg


def _unwrapped(arg: Any) -> Any:
    if isinstance(arg, Away):
        return arg.numbers
    if isinstance(arg, list | tuple):
        return type(arg)(map(_unwrapped, arg))
    return arg


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation moves no number: how many there are is torch's own affair."""
    infos = [part.alias_info for part in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation returns or changes what it was given."""
    schema = func._schema
    return any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func._schema.name == "aten::_pin_memory":  # host memory: there is no device to pin it for
        return args[0]
    asked = kwargs.get("device")
    if asked is None:
        away = any(isinstance(leaf, Away) for leaf in (*_leaves(args), *kwargs.values()))
    else:
        away = torch.device(asked) == NOWHERE
    inner = {name: _unwrapped(value) for name, value in kwargs.items()}
    if asked is not None:
        inner["device"] = torch.device("cpu")
    found = func(*map(_unwrapped, args), **inner)
    if not away:
        return found
    found = tree_map_only(Tensor, Away, found)
    if not _aliases(func):
        return found
    return return_and_correct_aliasing(func, args, kwargs, found)  # type: ignore[no-untyped-call]
