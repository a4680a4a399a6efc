"""Every launch of the Triton kernels compiles for GPUs that are not here, with what a call chooses.

The interpreter runs what the compiler refuses. Whether the machine code is right, only a GPU says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvlab.kernels.attention import Rule
from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.stored import Stored, Turn

triton = pytest.importorskip("triton")
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by compute capability."""


class Driver:
    """What Triton asks of a driver before it compiles. A device's number is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    """The kernel's name, the bytes of shared memory of a block of it, and which code it is."""

    kernel: str
    shared: int
    code: str


Begin = Callable[..., list[Launch]]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Begin:
    """Let launches compile and run nothing; return the list that they come to stand in."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def begin(capability: int = 90) -> list[Launch]:
        found: list[Launch] = []
        run = triton.runtime.JITFunction.run

        def launch(kernel: Any, *args: Any, **given: Any) -> Any:
            made = run(kernel, *args, **given | {"warmup": True})
            assert made.asm["cubin"]
            assert made.metadata.shared <= SHARED[capability]
            found.append(Launch(kernel.__name__, made.metadata.shared, made.metadata.hash))
            return made

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(capability))
        monkeypatch.setattr(triton.runtime.JITFunction, "run", launch)
        return found

    return begin


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


def test_cosine(compiling: Begin) -> None:
    from kvlab.kernels.gpu import cosine

    found = compiling()
    x, valid = torch.ones(2, 3, 4096).bfloat16(), torch.ones(2, 3, dtype=torch.bool)
    cosine.residual_cosine(x, x)
    cosine.add_with_cosine(x, x, valid)
    cosine.add_with_cosine(x[..., ::3], x.double()[..., ::3])
    assert names(found) == ["_cosine_kernel"] * 2 + ["_mean_kernel"] + [
        "_cosine_kernel",
        "_mean_kernel",
    ]


def test_evict(compiling: Begin) -> None:
    from kvlab.kernels.evict import Stays
    from kvlab.kernels.gpu import evict

    found = compiling()
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
    evict.evict(positions.expand(2, -1, -1, -1), numbers, Stays(window=numbers[:2].int()))
    slots = torch.zeros(3, 1, 1, dtype=torch.long)
    evict.write(cache, cache, row, row, slots)
    assert names(found) == ["_evict_kernel"] * 4 + ["_write_kernel"]


def test_tokens(compiling: Begin) -> None:
    from kvlab.kernels.gpu import tokens

    found = compiling()
    for rows, dim, dtype in ((6, 64, torch.bfloat16), (128, 256, torch.bfloat16)):
        q, k = torch.ones(1000, 8, 1, dim, dtype=dtype), torch.ones(1000, 1, rows, dim, dtype=dtype)
        tokens.attend_block(q, k, k, torch.ones(1000, dtype=torch.long))
    tokens.attend_block(q[..., :32].float(), k[:, :, :3, :32].float(), k[:, :, :3, :32].float())
    assert names(found) == ["_block_kernel"] * 3


def test_select(compiling: Begin) -> None:
    from kvlab.kernels.gpu import select

    found = compiling()
    select.best(torch.zeros(2, 5000), 40, budgets=torch.zeros(2, dtype=torch.long))
    select.best(torch.zeros(2, 100)[:, ::2], 40, above=0.5)
    assert names(found) == ["_best_kernel"] * 2


@pytest.mark.parametrize("count", [1, 20])
def test_adore(compiling: Begin, count: int) -> None:
    from kvlab.kernels.adore import Cell, Head
    from kvlab.kernels.gpu import adore

    found = compiling()
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
    assert names(found) == ["_advance_kernel"] + ["_score_kernel"] * 2


def test_a_text_that_grows_asks_for_no_new_code(compiling: Begin) -> None:
    from kvlab.kernels.adore import Head
    from kvlab.kernels.gpu import adore

    found = compiling()
    memory, query = torch.zeros(2, 99, 96), torch.zeros(2, 3 * 32)
    head, newest = Head(torch.zeros(3, 64), torch.zeros(3)), torch.zeros(2, dtype=torch.long)
    for count in (1, 8, 31, 32, 99):
        adore.score(head, memory, query, newest, count)
    assert len(found) == 5
    assert len({launch.code for launch in found}) == 1


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_query(compiling: Begin, capability: int) -> None:
    from kvlab.kernels.gpu import query

    found = compiling(capability)
    for dtype, dim, rows in (
        (torch.bfloat16, 128, 1), (torch.float16, 80, 64), (torch.float32, 256, 20)
    ):  # fmt: skip
        x, weight = torch.zeros(rows, 1, 1024).to(dtype), torch.zeros(4 * dim, 1024).to(dtype)
        cos = torch.zeros(rows, 1, 1, dim // 2).to(dtype)
        query.project(x, weight, dim, turn=(cos, cos))
        query.project(x, weight, dim, bias=weight[:, 0].clone(), norm=weight[0, :dim])
    assert names(found) == ["_query_kernel"] * 6
    assert all(launch.shared for launch in found)


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


def few(bits: int, width: int, dtype: torch.dtype, turned: bool = False) -> Given:
    """Rows in few bits, in groups of 32, and 33 recent ones."""
    q, recent = torch.zeros(2, 8, 1, width, dtype=dtype), torch.zeros(2, 2, 33, width, dtype=dtype)

    def of(*shape: int, size: int) -> Groups:
        codes = torch.zeros(2, 2, *shape[:-2], *(n if n > 1 else size for n in shape[-2:]))
        scale = torch.zeros(2, 2, *shape, dtype=dtype)
        return Groups(codes.byte(), scale, scale, torch.zeros(2, 2, 33, dtype=torch.int32))

    kept = FewBits(bits, of(2, 1, width, size=4 * bits), of(64, width // 32, 1, size=4 * bits))
    angles = torch.zeros(64, width // 2)
    turn = Turn(torch.zeros(2, 64).long(), angles, angles) if turned else None
    return q, recent, Stored(turn=turn, few=kept)


@pytest.mark.parametrize(
    ("given", "rule", "capability"),
    [
        (dense(torch.bfloat16, 128), Rule(), 90),
        (dense(torch.float16, 256), Rule(window=5, sinks=2), 80),
        (packed(), Rule(True, 5, 2), 90),
        (pooled(torch.int8), Rule(), 80),
        (pooled(torch.uint8), Rule(window=5), 90),
        (few(2, 64, torch.float16), Rule(), 80),
        (few(2, 128, torch.bfloat16), Rule(window=5), 90),
        (few(4, 64, torch.float32), Rule(), 90),
        (few(4, 128, torch.bfloat16, turned=True), Rule(), 90),
    ],
    ids=["dense", "wide", "packed", "int8", "fp8", "2 bits", "2 bits 128", "4 bits", "4 bits 128"],
)
def test_attention(compiling: Begin, given: Given, rule: Rule, capability: int) -> None:
    from kvlab.kernels.gpu import attention

    found = compiling(capability)
    q, k, stored = given
    if k.shape[2] == q.shape[2]:
        attention.attend(q, k, k, None, None, rule, slice(None))
        assert names(found) == ["forward", "weigh"]
    else:
        p, j = torch.zeros(len(q), q.shape[2]).long(), torch.zeros(len(q), 64).long()
        attention.attend(q, k, k, p, j, rule, slice(None), stored, parts=8)
        assert names(found) == ["forward", "combine", "weigh"]
    assert all(launch.shared for launch in found)
