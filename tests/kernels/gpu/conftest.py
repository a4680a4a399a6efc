"""The device of these tests: CUDA's, or the CPU with kernels run by Triton's interpreter.

What a kernel is, is settled when it and Triton's own library are imported. So interpreted ones have
copies of both, which stand in `sys.modules` while a test of this folder runs, and at no other time.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

KERNELS = "kvlab.kernels.gpu"


def _taken() -> dict[str, ModuleType]:
    """Take triton and our kernels out of what is imported; return them.

    But for triton's C library, which a process can load once only.
    """
    ours = [n for n in sys.modules if n.startswith((KERNELS, "triton.")) or n == "triton"]
    return {n: sys.modules.pop(n) for n in ours if not n.startswith("triton._C")}


@pytest.fixture(scope="session")
def interpreted() -> dict[str, ModuleType]:
    """The copies; they take up what tests import."""
    return {}


@pytest.fixture(autouse=True)
def device(
    interpreted: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Import what is in `kvlab.kernels.gpu` within tests alone."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    before = _taken()
    sys.modules.update(interpreted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("triton.language")
    if not interpreted:
        _mend(importlib.import_module("triton.runtime.interpreter"))
    yield torch.device("cpu")
    interpreted.update(_taken())
    sys.modules.update(before)


def _mend(interpreter: Any) -> None:
    """Let the interpreter round to bfloat16, and multiply them.

    It cuts what a GPU rounds to the nearest, and takes their bits for integers.
    """
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    plain, bfloat16 = builder.create_dot, interpreter.tl.bfloat16
    cut, float32 = builder.cast_impl, interpreter.tl.float32

    def wide(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return handle((x.data.astype("uint32") << 16).view("float32"), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == float32 and to.scalar == bfloat16:
            bits = x.data.view("uint32")
            bits = bits + ((bits >> 16 & 1) + 0x7FFF) * (x.data == x.data)  # NaN stays
            x = handle((bits >> 16 << 16).view("float32"), float32)
        return cut(self, x, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


@pytest.fixture
def seed() -> int:
    """Seed torch and random afresh in every run; pytest shows the number with a failure."""
    number = random.randrange(2**31)
    print(f"seed {number}")
    torch.manual_seed(number)
    random.seed(number)
    return number


@pytest.fixture
def there(device: torch.device, beside: Any) -> Iterator[Any]:
    """A CUDA device that is emulated, see `tests/device.py`; its tensors end with the test."""
    if device.type == "cuda":
        pytest.skip("emulates what is there")
    with beside("device.py").emulated_device() as opened:
        yield opened
