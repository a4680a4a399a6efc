"""The best of many rows, by looking for the lowest score that is among them; no sort.

A program goes through a row once for every four bits of a score, from the highest, and counts what
still can be the last of the best; once more to write down what is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.gpu.ordered import ordered
from kvlab.kernels.select import refuse_scores

TILE = 1024
"""Most numbers that a program looks at at a time."""


def best(
    scores: Tensor, most: int, *, above: float = float("-inf"), budgets: Tensor | None = None
) -> Tensor:
    """Do as `kvlab.kernels.select.best` does, in one launch."""
    refuse_scores(scores, most, budgets)
    out = torch.empty((*scores.shape[:-1], most), device=scores.device, dtype=torch.int64)
    if not out.numel():
        return out
    count = scores.shape[-1]
    rows = scores.reshape(out.numel() // most, count)
    allowed = rows if budgets is None else budgets.reshape(-1)
    block = min(triton.next_power_of_2(max(count, 16)), TILE)
    with torch.cuda.device_of(scores):
        _best_kernel[(len(rows),)](
            rows, allowed, out, count, most, float(above), *rows.stride(), allowed.stride(0),
            BUDGETS=budgets is not None, BLOCK=block,
            num_warps=8 if block >= 512 else 4,
        )  # fmt: skip
    return out


@triton.jit
def _bits(scores_ptr, number, count, stride, above):
    """A score's bits as a number from 1 to 2^32 of the same order; 0 where it does not count."""
    score = tl.load(scores_ptr + number.to(tl.int64) * stride, mask=number < count, other=0.0)
    bits = ordered(score).to(tl.int64) + 2147483648
    return tl.where((number < count) & (score > above), bits, 0)


@triton.jit
def _best_kernel(
    scores_ptr, budgets_ptr, out_ptr, count, most, above, scores_row, scores_number, budgets_row,
    BUDGETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * scores_row
    out_ptr += row * most
    wanted = tl.full((), 0, tl.int64) + most
    if BUDGETS:
        budget = tl.load(budgets_ptr + row * budgets_row).to(tl.int64)
        wanted = tl.minimum(wanted, tl.maximum(budget, 0))
    eligible = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        bits = _bits(scores_ptr, number, count, scores_number, above)
        eligible += (bits > 0).to(tl.int32)
    wanted = tl.minimum(wanted, tl.sum(eligible, 0).to(tl.int64))
    digit = tl.arange(0, 16).to(tl.int64)
    last = tl.full((), 0, tl.int64)  # the bits, so far, of the last of the best
    for step in range(8):
        shift = 28 - 4 * step
        counts = tl.full((16,), 0, tl.int32)
        for start in range(0, count, BLOCK):
            number = start + tl.arange(0, BLOCK)
            bits = _bits(scores_ptr, number, count, scores_number, above)
            rest = tl.where(bits > 0, bits >> shift, -1)
            of_digit = (rest[:, None] >> 4 == last) & (rest[:, None] & 15 == digit[None, :])
            counts += tl.sum((of_digit & (rest >= 0)[:, None]).to(tl.int32), 0)
        higher = tl.sum(tl.where(digit[None, :] > digit[:, None], counts[None, :], 0), 1)
        enough = (higher + counts).to(tl.int64) >= wanted
        found = tl.max(tl.where(enough, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit == found, higher, 0), 0).to(tl.int64)
        last = last * 16 + found
    taken = tl.full((), 0, tl.int64)
    equal = tl.full((), 0, tl.int64)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        bits = _bits(scores_ptr, number, count, scores_number, above)
        ties = ((bits == last) & (bits > 0)).to(tl.int32)
        among = equal + tl.cumsum(ties, 0) <= wanted
        takes = ((bits > last) | ((ties > 0) & among)).to(tl.int32)
        place = taken + tl.cumsum(takes, 0) - 1
        tl.store(out_ptr + place, number.to(tl.int64), mask=(takes > 0) & (place < most))
        taken += tl.sum(takes, 0).to(tl.int64)
        equal += tl.sum(ties, 0).to(tl.int64)
    for start in range(0, most, BLOCK):
        place = start + tl.arange(0, BLOCK)
        none = tl.full((BLOCK,), -1, tl.int64)
        tl.store(out_ptr + place, none, mask=(place >= taken) & (place < most))
