"""Numbers in few bits: codes, scales, and codes packed into bytes. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(
    x: Tensor, bits: int, dim: int, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return unsigned codes of groups of numbers, each group with its scale and minimum.

    code = round(clamp((x - low) / scale, 0, 2^bits - 1)), halves to even, in the dtype of x; scale
    = (high - low) / (2^bits - 1). All codes of a constant group are 0 (arXiv 2402.02750, with what
    its repository leaves undefined).

    Args:
        x: a group is what lies along `dim`.
        counted: broadcasts to x; false where an element is of no account: it does not widen its
            group, and its code is 0. A group without a single element has no meaning.

    Returns:
        codes, uint8, in the shape of x; scale and low, in its dtype, with 1 at `dim`.
    """
    if counted is None:
        low, high = x.aminmax(dim=dim, keepdim=True)
    else:
        low = x.masked_fill(~counted, torch.inf).amin(dim, keepdim=True)
        high = x.masked_fill(~counted, -torch.inf).amax(dim, keepdim=True)
    most = 2**bits - 1
    scale = (high - low) / most
    codes = (x - low).div_(scale.masked_fill(scale == 0, 1)).clamp_(0, most).round_()
    if counted is not None:
        codes.masked_fill_(~counted, 0)
    return codes.to(torch.uint8), scale, low


def dequantise(
    codes: Tensor, scale: Tensor, low: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return codes * scale + low in the dtype of the scale, each step rounded to it.

    Args:
        codes: integers. scale, low: broadcast to them; low None: no minimum was taken off.
        out: where to write it.
    """
    x = codes.to(scale.dtype) if out is None else out.copy_(codes)
    x.mul_(scale)
    return x if low is None else x.add_(low)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack uint8 codes into bytes along a dimension, the first code in the lowest bits.

    Args:
        codes: below 2^bits. bits: 1, 2, 4 or 8. dim: negative; filled up with zeros to a whole
            byte.

    Returns:
        uint8, ceil(n * bits / 8) along `dim`. Four of them in order are a little-endian word.
    """
    per = 8 // bits
    if missing := -codes.shape[dim] % per:
        shape = list(codes.shape)
        shape[dim] = missing
        codes = torch.cat((codes, codes.new_zeros(shape)), dim)
    first, *rest = torch.unflatten(codes, dim, (-1, per)).unbind(dim)
    packed = first.clone()
    for i, part in enumerate(rest, 1):
        packed |= part << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes that `pack` packed along `dim` (negative), filling included."""
    per, most = 8 // bits, 2**bits - 1
    if dim == -1 and per > 1:
        # Neighbours in memory: a byte becomes a word with a code in each of its bytes.
        words = packed.to(WORDS[per])
        spread = words.clone()
        for i in range(1, per):
            spread |= words << (i * (8 - bits))
        mask = sum(most << (8 * i) for i in range(per))
        return spread.bitwise_and_(mask).view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = packed.unsqueeze(dim) >> shifts.view(per, *[1] * (-dim - 1))
    return codes.bitwise_and_(most).flatten(dim - 1, dim)


def quantise_symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return signed 8-bit codes of rows, each row with its scale: its largest magnitude is 127.

    Args:
        x: [..., D].

    Returns:
        int8 [..., D]; scale [..., 1] in the dtype of x. The codes are those of that rounded scale.
        All codes of a row of zeros are 0.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127
    wide = scale.float()
    codes = (x.float() / wide.masked_fill(wide == 0, 1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes, the lowest first in memory."""
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = 448.0
"""The largest number of that format."""


def to_float8(x: Tensor) -> Tensor:
    """Round to 8-bit floats (4 bits of exponent, 3 of mantissa); what is too large is clamped."""
    return x.clamp(-FLOAT8_MOST, FLOAT8_MOST).to(FLOAT8)


def from_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 8-bit floats (none of them NaN), whose bytes `codes` are, in another dtype."""
    if codes.device.type != "cpu":
        return codes.view(FLOAT8).to(dtype)
    # CPUs convert them one by one, but half floats many at a time: the same bits, 8 powers lower.
    half = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(~0x4000).view(torch.float16)
    return half.to(dtype).mul_(256)


def quantise_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit floats of rows, each row with its scale: its largest magnitude is 448.

    Args:
        x: [..., D].

    Returns:
        float8_e4m3fn [..., D]; scale [..., 1] in the dtype of x.
    """
    scale = x.abs().amax(-1, keepdim=True) / FLOAT8_MOST
    wide = scale.float()
    return to_float8(x.float() / wide.masked_fill(wide == 0, 1)), scale
