"""Storages that keep each row by itself: the ways to put one, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels.quantise import dequantise, quantise_float8, quantise_symmetric, to_float8
from kvlab.methods.cache.storage import PlainStorage, Space, Storage
from kvlab.methods.registry import REGISTRY, resolve

WRITTEN: list[dict[str, Any]] = [{}, {"int8": {}}, {"fp8": {}}, {"fp8": {"scale": "none"}}]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def opened(written: dict[str, Any], dtype: torch.dtype = torch.float32) -> Storage:
    space = Space(2, 3, 9, 8, torch.device("cpu"), dtype)
    choice = resolve(written).choices.get("precision")
    if choice is None or choice.value.implementation is None:
        return PlainStorage(None, space)
    storage: Storage = choice.value.load()(choice.params, space)
    return storage


def through(written: dict[str, Any], x: Tensor) -> Tensor:
    """What the precision makes of rows."""
    if "int8" in written:
        return dequantise(*quantise_symmetric(x))
    if written.get("fp8") == {"scale": "none"}:
        return to_float8(x).to(x.dtype)
    if "fp8" in written:
        codes, scale = quantise_float8(x)
        return codes.to(x.dtype) * scale
    return x


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(2, 3, n, 8) * torch.tensor([0.01, 1, 500])[:, None, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_every_way_of_naming_slots(written: dict[str, Any], dtype: torch.dtype) -> None:
    k, v = rows(4, dtype), rows(4, dtype)
    index = torch.tensor([6, 2, 0, 3])
    ways = [index, index.expand(2, 1, 4), index.expand(2, 3, 4)]
    by_slot = torch.argsort(index)
    for slots in ways:
        storage = opened(written, dtype)
        storage.put(slots, k, v)
        for found, given in zip(storage.get(7), (k, v), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found[:, :, [0, 2, 3, 6]], through(written, given)[:, :, by_slot])
            assert not found[:, :, [1, 4, 5]].any()
    storage = opened(written, dtype)
    storage.put(slice(1, 5), k, v)
    storage.put(slice(4, 5), k[:, :, :1], v[:, :, :1])
    expected = through(written, torch.cat((v[:, :, :3], v[:, :, :1]), dim=2))
    assert torch.equal(storage.get(9)[1][:, :, 1:5], expected)


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_each_head_its_own_slot(written: dict[str, Any]) -> None:
    storage, k, v = opened(written), rows(1), rows(1)
    slots = torch.tensor([[0, 4, 8], [3, 3, 1]])
    storage.put(slots.unsqueeze(-1), k, v)
    found = storage.get(9)
    for sample in range(2):
        for head in range(3):
            for part, given in zip(found, (k, v), strict=True):
                own = part[sample, head]
                expected = through(written, given)[sample, head, 0]
                assert torch.equal(own[slots[sample, head]], expected)
                assert int(own.any(1).sum()) == 1


@pytest.mark.parametrize("written", WRITTEN, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_negative_slot_takes_nothing(written: dict[str, Any], heads: int) -> None:
    storage, first = opened(written), rows(9)
    storage.put(slice(0, 9), first, first)
    slots = torch.tensor([[5, -1, 0], [-1, -1, -1]]).unsqueeze(1).expand(2, heads, 3)
    k, v = rows(3), rows(3)
    storage.put(slots, k, v)
    for found, given in zip(storage.get(9), (k, v), strict=True):
        expected, new = through(written, first), through(written, given)
        expected = expected.clone()
        expected[0, :, 5], expected[0, :, 0] = new[0, :, 0], new[0, :, 2]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("written", WRITTEN, ids=str)
def test_a_saved_storage_is_taken_over(written: dict[str, Any]) -> None:
    storage, other, x = opened(written), opened(written), rows(9)
    storage.put(slice(0, 9), x, x)
    for name, part in other.state().items():
        part.copy_(storage.state()[name])
    assert torch.equal(other.get(9)[0], storage.get(9)[0])
    assert torch.equal(other.get(9)[1], storage.get(9)[1])


def test_every_precision_is_tested_somewhere() -> None:
    tested = {name for written in WRITTEN for name in written} | {"kivi"}
    values = {v.name for v in REGISTRY.values("precision") if v.implementation is not None}
    assert values == tested
