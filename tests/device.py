"""A CUDA device that is not there: its tensors lie on the CPU and say `cuda:0`.

What CUDA refuses is refused: a call between devices, a kernel given a tensor of the host. Whoever
waits for the device is noted, with the line that did.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
KNOWN = torch.device("meta:7")
"""What torch's own code takes the device for: a build without CUDA has guards and queues for it."""
ASKS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "argwhere", "masked_select", "equal",
    "allclose", "_unique2", "unique_dim", "unique_consecutive", "bincount", "one_hot",
}  # fmt: skip
"""Whose answer the host waits for."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy", "to", "cpu", "_copy_from"}
TOGETHER = {
    "cat", "stack", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_select",
    "mm", "bmm", "addmm", "matmul", "linear", "embedding", "take_along_dim", "searchsorted",
}  # fmt: skip
"""Take no scalar of the host beside tensors of the device."""

RESHAPED = {"transpose_", "t_", "squeeze_", "unsqueeze_"}


class There(Tensor):
    """A tensor on the device, whose numbers are in `inner`."""

    inner: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda, is_cpu, is_meta = True, False, False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        with torch.inference_mode(inner.is_inference()):
            made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=KNOWN,
            )  # fmt: skip
        made.inner = inner
        return made

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return 0

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        raise AssertionError(f"{func}: the emulated device is closed")


class Generator(torch.Generator):
    """A generator of the CPU, or one that says it is of the device."""

    there: bool

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.there = torch.device(device).type == "cuda"
        return made


class Device(TorchDispatchMode):
    """The device, while it is entered.

    Attributes: waits: "file:line call" of each wait for it, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and it takes seconds to import

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        named = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        there = any(isinstance(tensor, There) for tensor in given)
        if not there and not any(device in (CUDA, KNOWN) for device in named):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_has_compatible_shallow_copy_type":
            return False  # so that modules that move get new parameters
        target = "cpu" if named and named[0].type == "cpu" else "cuda"
        if there:
            self._refuse(func, name, given, args)
        self._note(func, name, there, target, args, kwargs)
        if name == "_fused_sdp_choice":
            return 0  # of torch's own attentions the one that runs on any device
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name in RESHAPED:
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)  # of what torch knows of the tensor: it holds no numbers
        own = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, There)}
        plain = {id(tensor) for tensor in given if not isinstance(tensor, There)}

        def outer(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            if target == "cpu":
                return x.clone() if id(x) in own else x
            if id(x) in own:
                found = own[id(x)]
                assert (found.shape, found.stride()) == (x.shape, x.stride()), func
                return found
            if id(x) in plain:  # copied to the device, or written on the host
                return There(x.clone()) if named else x
            return There(x)

        return tree_map(outer, out)

    def pin(self, x: Tensor) -> Tensor:
        """A copy in pinned memory."""
        assert not isinstance(x, There)
        copied = x.clone()
        storage = copied.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return copied

    def pinned(self, x: Tensor) -> bool:
        return not isinstance(x, There) and x.untyped_storage().data_ptr() in self._pinned

    def wait(self, what: str) -> None:
        """Note the innermost line of kvlab's that waits."""
        frames = [f for f in traceback.extract_stack() if _ours(f.filename)]
        at = f"{_ours(frames[-1].filename)}:{frames[-1].lineno}" if frames else "elsewhere"
        self.waits.append(f"{at} {what}")

    def _refuse(self, func: Any, name: str, given: list[Tensor], args: Any) -> None:
        """Refuse what CUDA refuses: tensors of the host, but for scalars and what is copied."""
        if name in COPIES:
            return
        if name in INDEXED:  # indices may be of the host
            given = tensors((args[0], args[2:]))
        hosts = [tensor for tensor in given if not isinstance(tensor, There)]
        if any(tensor.dim() or name in TOGETHER for tensor in hosts):
            raise RuntimeError(f"{func}: tensors on cuda:0 and the CPU")

    def _note(self, func: Any, name: str, there: bool, target: str, args: Any, kwargs: Any) -> None:
        """Note a wait for the device."""
        if name in COPIES and not args[0].numel():
            return
        if name in ASKS and there:
            self.wait(name)
        elif name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor"):
            if kwargs.get("output_size") is None:
                self.wait(name)
        elif name in INDEXED:
            for index in args[1]:
                if index is None:
                    continue
                if not isinstance(index, There):
                    self.wait(f"{name} by an index of the host")
                elif index.dtype in (torch.bool, torch.uint8) and not _fills(name, args):
                    self.wait(f"{name} by a mask")
        elif name == "copy_":
            to, source = args[:2]
            if isinstance(to, There) != isinstance(source, There):
                host = source if isinstance(to, There) else to
                late = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not (late and self.pinned(host)) and not (host is source and not host.dim()):
                    self.wait("copy_ between devices")
        elif name in COPIES and there == (target == "cpu"):
            late = kwargs.get("non_blocking") or (len(args) > 3 and args[3] is True)
            source = args[0]
            if not (late and target == "cuda" and self.pinned(source)):
                self.wait("to the host" if there else "from the host")


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _fills(name: str, args: Any) -> bool:
    """Whether torch fills by the mask, which waits for nobody."""
    return name != "index" and args[2].numel() == 1 and not isinstance(args[2], There)


def _inner(x: object) -> object:
    if isinstance(x, There):
        return x.inner
    return CPU if isinstance(x, torch.device) else x


def _ours(file: str) -> str:
    for folder in ("methods", "kernels", "platform"):
        head, found, rest = file.rpartition(f"/{folder}/")
        if found and "/tests/" not in file and "site-packages" not in file and "/lib/" not in head:
            return f"{folder}/{rest}"
    return ""


class _Calls(TorchFunctionMode):
    """What torch settles before its dispatcher is asked."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        there = isinstance(first, There)
        if name in ("tolist", "numpy") and there:
            self.device.wait(name)
            return func(first.inner, *args[1:], **kwargs)
        if name == "new_tensor" and there:
            raise NotImplementedError("new_tensor")
        if name == "pin_memory":
            return self.device.pin(first)
        if name == "is_pinned":
            return self.device.pinned(first)
        if name in ("__getitem__", "__setitem__") and there:
            at = tuple(map(_sent, args[1])) if isinstance(args[1], tuple) else _sent(args[1])
            args = (first, at, *args[2:])
            if name == "__setitem__" and isinstance(args[2], int | float):
                args = first, at, torch.tensor(args[2], dtype=first.dtype)  # as torch for CUDA
        if name in ("to", "cpu", "cuda"):
            return self._to(name, first, args[1:], kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if "device" in kwargs:
            kwargs["device"] = _indexed(kwargs["device"])
            if name in ("tensor", "as_tensor") and kwargs["device"] == CUDA:
                del kwargs["device"]
                return func(*args, **kwargs).to(CUDA)
        out = func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "there", False) != isinstance(out, There):
            raise RuntimeError(f"{name}: a generator of another device")
        return self.device.pin(out) if pinned else out

    def _to(self, name: str, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if name != "to":
            args = (CUDA if name == "cuda" else CPU,)
        args = tuple(_indexed(given) for given in args)
        kwargs = {key: _indexed(given) for key, given in kwargs.items()}
        device, dtype, late, _ = torch._C._nn._parse_to(*args, **kwargs)
        device = x.device if device is None else device
        if device == x.device and dtype in (None, x.dtype) and not copy:
            return x
        asked = {"device": device, "dtype": dtype or x.dtype, "non_blocking": late}
        return torch.ops.aten._to_copy.default(x, **asked)


def _sent(index: object) -> object:
    """A list among indices is a tensor of the host's that is sent."""
    return torch.tensor(index, dtype=torch.long).to(CUDA) if isinstance(index, list) else index


def _indexed(x: object) -> object:
    if x == "cuda" or (isinstance(x, torch.device) and x.type == "cuda"):
        return CUDA
    return x


@contextmanager
def emulated_device() -> Iterator[Device]:
    """Open the device; tensors made on it are of no use afterwards."""
    from triton.runtime import KernelInterface

    opened, current = Device(), [0]
    launch = KernelInterface.__getitem__

    def exchange(index: int) -> int:
        before, current[0] = current[0], max(index, 0)
        return before

    def launched(self: Any, grid: Any) -> Callable[..., Any]:
        run = launch(self, grid)

        def call(*args: Any, **kwargs: Any) -> Any:
            for tensor in tensors((args, kwargs)):
                if not isinstance(tensor, There):
                    raise ValueError(f"{self.fn.__name__}: was given a tensor of the host")
            modes = _get_current_dispatch_mode_stack()
            recording = next((mode for mode in modes if hasattr(mode, "launch")), None)
            args, kwargs = tree_map(_inner, (args, kwargs))
            with _disable_current_modes():
                if recording is None:
                    return kernel(*args, **kwargs)
                return recording.launch(kernel, args, kwargs)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return run(*args, **kwargs)

        return call

    properties = SimpleNamespace(multi_processor_count=4, L2_cache_size=1 << 20)
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "current_device": lambda: current[0],
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "emulated",
        "mem_get_info": lambda device=None: (1 << 33, 1 << 34),
        "synchronize": lambda device=None: opened.wait("synchronize"),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(KernelInterface, "__getitem__", launched)
        with _Calls(opened), opened:
            yield opened
