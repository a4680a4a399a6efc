"""The queries of a layer that owns no keys: a linear map and its rotation, of a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from kvlab.kernels.choice import torch_only
from kvlab.kernels.query import project
from kvlab.platform.bench.kernels.case import Bench, Case, apart, poisoned
from kvlab.platform.bench.kernels.decode import points
from kvlab.platform.bench.line import Line

SHAPES = {"cuda": ((4096, 32, 128), (2048, 32, 64)), "cpu": ((32, 4, 16),)}
"""Width, heads and their size: of Mistral 7B, and of a Llama with 1.1B parameters."""
BATCHES = {"cuda": (1, 64, 16, 32, 4), "cpu": (3,)}


def run(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Line]:
    """Measure one token of each sample."""
    bench = Bench(device)
    shapes, batches = SHAPES[bench.device.type], BATCHES[bench.device.type]
    yield from bench.run(
        (prod(shapes[place]) * dtype.itemsize, partial(layer, bench, batch, *shapes[place], dtype))
        for batch, place in points(batches, range(len(shapes)))
    )


def layer(bench: Bench, batch: int, width: int, heads: int, dim: int, dtype: torch.dtype) -> Case:
    """One size, beside torch's linear map without the rotation."""
    x = torch.randn(batch, 1, width, device=bench.device, dtype=dtype)
    weight = torch.randn(heads * dim, width, device=bench.device, dtype=dtype) * width**-0.5
    half = torch.rand(batch, 1, 1, dim // 2, device=bench.device) * 6
    cos, sin = (
        torch.cat((low, high), dim=-1).to(dtype)
        for low, high in ((half.cos(), half.cos()), (-half.sin(), half.sin()))
    )
    read = sum(t.numel() for t in (x, weight, cos, sin))
    return Case(
        "queries of a layer",
        {"batch": batch, "width": width, "heads": heads},
        partial(project, x, weight, dim, turn=(cos, sin)),
        (read + batch * heads * dim) * dtype.itemsize,
        partial(correct, x, weight, dim, (cos, sin)),
        rivals={"torch linear, not rotated": partial(torch.nn.functional.linear, x, weight)},
    )


def correct(x: Tensor, weight: Tensor, dim: int, turn: tuple[Tensor, Tensor]) -> str:
    """All queries must be those of the same numbers in float32."""
    with poisoned():
        found = project(x, weight, dim, turn=turn)
    with torch_only():
        exact = project(x.float(), weight.float(), dim, turn=(turn[0].float(), turn[1].float()))
    return apart(found, exact, names="queries")
