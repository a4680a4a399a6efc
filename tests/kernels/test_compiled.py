"""Every launch of the Triton kernels compiles for a Hopper GPU; none is needed for that.

The interpreter runs what the compiler refuses. Whether the machine code is right, only a GPU says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Compiles:
    """Stands for a kernel: compiles where it is launched, as a launch would."""

    def __init__(self, kernel: Any, compiled: list[str]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {n: named.pop(n) for n in ("num_warps", "num_stages") if n in named}
        given = inspect.signature(self.kernel.fn).bind(*args, **named).arguments
        signature, constants, attributes = {}, {}, {}
        for place, (name, value) in enumerate(given.items()):
            constant = self.kernel.params[place].is_constexpr or value is None or value is True
            if constant or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = _type(value)
            start = value.data_ptr() if isinstance(value, Tensor) else value
            if isinstance(start, int) and start % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.compiled.append(self.kernel.__name__)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[ModuleType], list[str]]:
    """Replace a module's kernels; return the list that names what was compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def replace(module: ModuleType) -> list[str]:
        found: list[str] = []
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Compiles(value, found))
        return found

    return replace


def test_cosine(compiled: Callable[[ModuleType], list[str]]) -> None:
    from kvlab.kernels.gpu import cosine

    found = compiled(cosine)
    x, valid = torch.ones(2, 3, 4096).bfloat16(), torch.ones(2, 3, dtype=torch.bool)
    cosine.residual_cosine(x, x)
    cosine.add_with_cosine(x, x, valid)
    cosine.add_with_cosine(x[..., ::3], x.double()[..., ::3])
    assert found == ["_cosine_kernel"] * 2 + ["_mean_kernel"] + ["_cosine_kernel", "_mean_kernel"]


def test_evict(compiled: Callable[[ModuleType], list[str]]) -> None:
    from kvlab.kernels.evict import Stays
    from kvlab.kernels.gpu import evict

    found = compiled(evict)
    numbers = torch.full((3,), 5)
    cache, row = torch.zeros(3, 2, 5000, 128).bfloat16(), torch.zeros(3, 2, 1, 128).bfloat16()
    positions = torch.zeros(3, 2, 5000, dtype=torch.long)
    scores, mass = torch.zeros(3, 2, 5000), torch.zeros(3, 8, 4000)
    stays = Stays(numbers, 4, 2048, numbers)
    evict.evict_and_write(
        cache, cache, row, row, positions, numbers, stays, scores=scores, mass=mass
    )
    evict.evict_and_write(cache, cache, row, row, positions[:, :1], numbers, Stays())
    evict.evict(positions[:, :1].int(), numbers.int(), Stays(), known=torch.zeros(3, 9000))
    slots = torch.zeros(3, 1, 1, dtype=torch.long)
    evict.write(cache, cache, row, row, slots)
    assert found == ["_evict_kernel"] * 3 + ["_write_kernel"]


def test_tokens(compiled: Callable[[ModuleType], list[str]]) -> None:
    from kvlab.kernels.gpu import tokens

    found = compiled(tokens)
    for rows, dim, dtype in ((6, 64, torch.bfloat16), (128, 256, torch.bfloat16)):
        q, k = torch.ones(1000, 8, 1, dim, dtype=dtype), torch.ones(1000, 1, rows, dim, dtype=dtype)
        tokens.attend_block(q, k, k, torch.ones(1000, dtype=torch.long))
    tokens.attend_block(q[..., :32].float(), k[:, :, :3, :32].float(), k[:, :, :3, :32].float())
    assert found == ["_block_kernel"] * 3


def test_select(compiled: Callable[[ModuleType], list[str]]) -> None:
    from kvlab.kernels.gpu import select

    found = compiled(select)
    select.best(torch.zeros(2, 5000), 40, budgets=torch.zeros(2, dtype=torch.long))
    select.best(torch.zeros(2, 100)[:, ::2], 40, above=0.5)
    numbers = torch.zeros(2, 300, dtype=torch.long)
    select.beside(numbers[:, :9], numbers, numbers[:, :8])
    assert found == ["_best_kernel"] * 2 + ["_beside_kernel"]


@pytest.mark.parametrize("count", [1, 20])
def test_adore(compiled: Callable[[ModuleType], list[str]], count: int) -> None:
    from kvlab.kernels.adore import Cell, Head
    from kvlab.kernels.gpu import adore

    found = compiled(adore)
    h, m, layers = 64, 32, count
    map_of = torch.zeros(layers * m, h), torch.zeros(layers * m)
    inner, address = (torch.zeros(h, h), torch.zeros(h)), (torch.zeros(m, h), torch.zeros(m))
    cell = Cell(torch.zeros(3 * h, h), torch.zeros(3 * h), *inner, *address, *map_of)
    places = torch.zeros(64, h), torch.zeros(63, dtype=torch.long)
    head = Head(torch.zeros(layers, h), torch.zeros(layers), *places)
    memory, newest = torch.zeros(count, 99, h + m).bfloat16(), torch.zeros(count, dtype=torch.long)
    query = adore.advance(cell, torch.zeros(count, 3 * h), torch.zeros(count, h), memory, newest)
    adore.score(head, memory, query, newest, 99)
    adore.score(Head(*head[:2]), memory, query, newest, torch.zeros(count, 1, dtype=torch.long))
    assert found == ["_advance_kernel"] + ["_score_kernel"] * 2
