"""Codes in few bits: error bounds, what packing keeps, what is left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlab.kernels.quantise import (
    FLOAT8_MOST,
    dequantise,
    from_float8,
    pack,
    quantise,
    quantise_float8,
    quantise_symmetric,
    to_float8,
    unpack,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
numbers = st.floats(-1e4, 1e4, width=32)
tables = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1)
)


@settings(deadline=None)
@given(tables, st.sampled_from([1, 2, 4, 8]), st.sampled_from([-1, -2]))
def test_an_error_is_half_a_step_at_most(table: list[list[float]], bits: int, dim: int) -> None:
    x = torch.tensor(table)
    codes, scale, low = quantise(x, bits, dim)
    found = dequantise(codes, scale, low)
    # Below the smallest normal number a step is rounded to nothing.
    rounding = 1e-6 * x.abs().amax(dim, keepdim=True) + torch.finfo(x.dtype).tiny
    assert int(codes.max()) < 2**bits
    assert bool(((found - x).abs() <= scale / 2 + rounding).all())
    assert torch.equal(low, x.amin(dim, keepdim=True))
    assert not codes[(scale == 0).expand_as(codes)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.7, 6e-8])
def test_a_constant_group_is_itself(dtype: torch.dtype, value: float) -> None:
    x = torch.full((2, 8), value, dtype=dtype)
    codes, scale, low = quantise(x, 2, -1)
    assert not codes.any()
    assert torch.equal(dequantise(codes, scale, low), x)


def test_halves_are_rounded_to_even() -> None:
    codes, _, _ = quantise(torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0]), 2, -1)
    assert codes.tolist() == [0, 0, 2, 2, 3]


@settings(deadline=None)
@given(tables, st.sampled_from([2, 4]), st.sampled_from([-1, -2]), st.data())
def test_what_does_not_count_changes_nothing(
    table: list[list[float]], bits: int, dim: int, data: st.DataObject
) -> None:
    x = torch.tensor(table).movedim(dim, -1).contiguous()
    kept = data.draw(st.lists(st.booleans(), min_size=x.shape[-1], max_size=x.shape[-1]))
    kept[0] = True
    counted = torch.tensor(kept)
    codes, scale, low = quantise(x.masked_fill(~counted, torch.nan), bits, -1, counted)
    alone = quantise(x[..., counted], bits, -1)
    assert torch.equal(codes[..., counted], alone[0])
    assert torch.equal(scale, alone[1])
    assert torch.equal(low, alone[2])
    assert not codes[..., ~counted].any()


@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([-1, -2]), st.integers(1, 17), st.integers(1, 5)
)
def test_packing_keeps_codes_in_ceil_bytes(bits: int, dim: int, length: int, other: int) -> None:
    shape = (2, other, length) if dim == -1 else (2, length, other)
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits, dim)
    assert packed.shape[dim] == -(-length * bits // 8)
    found = unpack(packed, bits, dim)
    assert torch.equal(found.narrow(dim, 0, length), codes)
    assert not found.narrow(dim, length, found.shape[dim] - length).any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(tables)
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype, table: list[list[float]]) -> None:
    x = normal(table, dtype)
    codes, scale = quantise_symmetric(x)
    assert scale.dtype == dtype
    exact = codes.double() * scale.double()
    assert bool(((exact - x.double()).abs() <= scale.double() * 0.501).all())
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert bool(((dequantise(codes, scale).double() - exact).abs() <= rounding).all())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(tables)
def test_fp8_keeps_four_bits(dtype: torch.dtype, table: list[list[float]]) -> None:
    """3 bits of mantissa: off by 1/16 at most, or by half the smallest number of the format."""
    x = normal(table, dtype)
    codes, scale = quantise_float8(x)
    found = codes.double() * scale.double()
    allowed = x.double().abs() / 16 + scale.double() * 2**-10
    assert bool(((found - x.double()).abs() <= allowed * 1.01).all())
    plain = to_float8(x).double()
    inside = x.double().clamp(-FLOAT8_MOST, FLOAT8_MOST)
    assert bool(((plain - inside).abs() <= inside.abs() / 16 + 2**-10).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_8_bit_float_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(from_float8(codes, dtype), expected)
    assert len(expected.unique()) == 253


def normal(table: list[list[float]], dtype: torch.dtype) -> Tensor:
    """The table without numbers whose scales the dtype could not tell apart."""
    x = torch.tensor(table)
    return x.masked_fill(x.abs() < 0.1, 0.0).to(dtype)


def test_rows_of_zeros() -> None:
    zeros = torch.zeros(2, 4)
    for codes, scale in (quantise_symmetric(zeros), quantise_float8(zeros)):
        assert not codes.float().any()
        assert not scale.any()
