"""Numbers as integers of the same order."""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(0x7F800000)
"""`ordered` of infinity."""
LOWEST = tl.constexpr(-0x7F800000)
"""`ordered` of the lowest finite number."""
MINUS_INF = tl.constexpr(-0x7F800001)
"""`ordered` of minus infinity, and of NaN."""


@triton.jit
def ordered(x):
    """int32 in the order of float32 numbers; both zeros are one, NaN is the least."""
    x = tl.where(x == x, x + 0.0, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
