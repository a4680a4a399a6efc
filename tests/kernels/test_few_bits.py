"""What rows in few bits stand for, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvlab.kernels.few_bits import FewBits, Groups
from kvlab.kernels.quantise import pack
from kvlab.kernels.stored import Stored

ROWS, LONG = 19, 2**31 - 1


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("dim", "blocks", "group"), [(16, 2, 8), (5, 1, 12), (6, 1, 24)])
def test_rows(bits: int, dim: int, blocks: int, group: int) -> None:
    """Codes times scale plus minimum, but for the slots in which a recent row stands."""
    draw = torch.Generator().manual_seed(bits * dim)
    many, width = -(-ROWS // group), dim // blocks

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    by_slot, by_channel = codes(2, 3, many, group, dim), codes(2, 3, ROWS, blocks, width)
    k, v = numbers(2, 3, 4, dim), numbers(2, 3, 2, dim)
    k_slots = torch.tensor([LONG, 7, ROWS, 0], dtype=torch.int32).expand(2, 3, 4)
    v_slots = torch.tensor([ROWS - 1, LONG], dtype=torch.int32).expand(2, 3, 2)
    k_scale, k_low = numbers(2, 2, 3, many, 1, dim).unbind(0)
    v_scale, v_low = numbers(2, 2, 3, ROWS, blocks, 1).unbind(0)
    keys = Groups(pack(by_slot, bits, -2), k_scale, k_low, k_slots)
    values = Groups(pack(by_channel, bits, -1), v_scale, v_low, v_slots)
    stored = Stored(few=FewBits(bits, keys, values))
    wanted_k, wanted_v = torch.empty(2, 2, 3, ROWS, dim).bfloat16().unbind(0)
    for slot in range(ROWS):
        own, place = (slice(None), slice(None), slot // group), slot % group
        wanted_k[:, :, slot] = by_slot[own][:, :, place] * k_scale[own][:, :, 0]
        wanted_k[:, :, slot] += k_low[own][:, :, 0]
        for d in range(dim):
            at = (slice(None), slice(None), slot, d // width)
            wanted_v[:, :, slot, d] = by_channel[at][..., d % width] * v_scale[at][..., 0]
            wanted_v[:, :, slot, d] += v_low[at][..., 0]
    wanted_k[:, :, 7], wanted_k[:, :, 0] = k[:, :, 1], k[:, :, 3]
    wanted_v[:, :, ROWS - 1] = v[:, :, 0]
    before = k.clone(), v.clone()
    for dtype in (torch.bfloat16, torch.float32):
        for found, wanted in zip(stored.rows(k, v, dtype), (wanted_k, wanted_v), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, wanted.to(dtype))
    assert torch.equal(before[0], k)
    assert torch.equal(before[1], v)
