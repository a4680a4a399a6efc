"""The attention kernels compile for GPUs that are not here, with the tiles that calls choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kvlab.kernels.attention import Rule
from kvlab.kernels.gpu import attention
from kvlab.kernels.stored import Stored, Turn

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by compute capability."""


class Driver:
    """What Triton asks of a driver before it compiles. A device's number is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiled:
    """Stands where a kernel does: a launch compiles it as ever and runs nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shared: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            found = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert found.asm["cubin"]
            self.shared.append(found.metadata.shared)

        return launch


Given = tuple[Tensor, Tensor, Stored]


def dense(dtype: torch.dtype, width: int) -> Given:
    q = torch.zeros(2, 8, 4, width, dtype=dtype)
    return q, torch.zeros(2, 2, 64, width, dtype=dtype), Stored()


def packed() -> Given:
    q = torch.zeros(1, 8, 256, 128, dtype=torch.bfloat16)
    return q, q[:, :2], Stored()


def pooled(dtype: torch.dtype) -> Given:
    """Codes in a pool, not rotated, with lengths."""
    pool, table = torch.zeros(99, 2, 128, dtype=dtype), torch.zeros(2, 64).long()
    scale, angles = torch.zeros(99, 2, 1).bfloat16(), torch.zeros(64, 64)
    kept = Stored(scale, scale, table, torch.zeros(2).long(), Turn(table, angles, angles))
    return torch.zeros(2, 8, 1, 128).bfloat16(), pool, kept


@pytest.mark.parametrize(
    ("given", "rule", "capability"),
    [
        (dense(torch.bfloat16, 128), Rule(), 90),
        (dense(torch.float16, 256), Rule(window=5, sinks=2), 80),
        (packed(), Rule(True, 5, 2), 90),
        (pooled(torch.int8), Rule(), 80),
        (pooled(torch.uint8), Rule(window=5), 90),
    ],
    ids=["dense", "wide", "packed", "int8", "fp8"],
)
def test_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: Given, rule: Rule, capability: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
    names = ("forward", "combine", "weigh")
    kernels = {name: Compiled(getattr(attention, name)) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(attention, name, kernel)
    q, k, stored = given
    if k.shape[2] == q.shape[2]:
        attention.attend(q, k, k, None, None, rule, slice(None))
    else:
        p, j = torch.zeros(len(q), q.shape[2]).long(), torch.zeros(len(q), 64).long()
        attention.attend(q, k, k, p, j, rule, slice(None), stored, parts=8)
        assert kernels["combine"].shared
    for name in ("forward", "weigh"):
        assert 0 < max(kernels[name].shared) <= SHARED[capability]
