"""The device of these tests: CUDA's, or the CPU with kernels run by Triton's interpreter."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

KERNELS = "kvlab.kernels.gpu"


def _named(*packages: str) -> list[str]:
    return [n for n in sys.modules if any(n == p or n.startswith(f"{p}.") for p in packages)]


@pytest.fixture(scope="package", autouse=True)
def device() -> Iterator[torch.device]:
    """Without CUDA kernels are interpreted, for these tests alone.

    What a kernel is, is settled when it and Triton's own library are imported: these tests have
    copies of both, and other tests of this process find theirs as they left them.
    """
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    importlib.import_module("triton.language")
    kept = {name: sys.modules[name] for name in _named("triton", KERNELS)}
    for name in kept:
        if not name.startswith("triton._C"):  # compiled code cannot be loaded twice
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")
        _mend(importlib.import_module("triton.runtime.interpreter"))
        yield torch.device("cpu")
    for name in _named("triton", KERNELS):
        del sys.modules[name]
    sys.modules.update(kept)


def _mend(interpreter: Any) -> None:
    """Let the interpreter multiply bfloat16: it takes their bits for integers."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    plain, bfloat16 = builder.create_dot, interpreter.tl.bfloat16

    def wide(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return handle((x.data.astype("uint32") << 16).view("float32"), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    builder.create_dot = create_dot


@pytest.fixture
def seed() -> int:
    """Seed torch afresh in every run; pytest shows the number with a failure."""
    number = random.randrange(2**31)
    print(f"seed {number}")
    torch.manual_seed(number)
    return number
