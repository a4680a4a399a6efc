"""What a decode step asks of ADORE's controller: a launch for the GRU and all that follows from it,
one for the scores of all tokens so far.

The first has a program for each sample, which would read too little to be spread; the second has
one for every few tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernels.adore import Cell, Head, refuse_cell, refuse_head


@torch.no_grad()
def advance(cell: Cell, came: Tensor, state: Tensor, memory: Tensor, newest: Tensor) -> Tensor:
    """Do as `kvlab.kernels.adore.advance` does, in one launch."""
    refuse_cell(cell, came, state, memory, newest)
    batch, h = state.shape
    m, asked = len(cell.address), len(cell.query)
    query = torch.empty((batch, asked), device=state.device, dtype=torch.float32)
    if not batch:
        return query
    hidden = cell.inner if cell.hidden is None else cell.hidden
    with torch.cuda.device_of(state):
        _advance_kernel[(batch,)](
            came, state, memory, newest, query,
            hidden, cell.inner_bias if cell.hidden_bias is None else cell.hidden_bias,
            cell.inner, cell.inner_bias, cell.address, cell.address_bias,
            cell.query, cell.query_bias, h, m, asked,
            *came.stride(), *state.stride(), *memory.stride()[:2], newest.stride(0),
            GATED=cell.hidden is not None, BLOCK_H=triton.next_power_of_2(h), BLOCK=32,
            num_warps=8,
        )  # fmt: skip
    return query


@torch.no_grad()
def score(
    head: Head, memory: Tensor, query: Tensor, newest: Tensor, positions: Tensor | int
) -> Tensor:
    """Do as `kvlab.kernels.adore.score` does, in one launch."""
    refuse_head(head, memory, query, newest, positions)
    batch, (layers, h) = len(query), head.weight.shape
    given = isinstance(positions, Tensor)
    count = positions.shape[1] if isinstance(positions, Tensor) else positions
    m = query.shape[1] // layers if layers else 0
    out = torch.empty((layers, batch, count), device=memory.device, dtype=torch.float32)
    if not out.numel():
        return out
    block_h = triton.next_power_of_2(h)
    at_once = min(64, max(16, 4096 // block_h))
    with torch.cuda.device_of(memory):
        _score_kernel[(triton.cdiv(count, at_once), batch)](
            memory, query, newest, positions if isinstance(positions, Tensor) else newest,
            head.weight, head.bias,
            head.weight if head.places is None else head.places,
            newest if head.edges is None else head.edges,
            out, out.stride(0), count, layers, h, m, m**-0.5 if m else 0.0,
            *memory.stride()[:2], *query.stride(), newest.stride(0),
            *(positions.stride() if isinstance(positions, Tensor) else (0, 0)),
            GIVEN=given, PLACED=head.places is not None, RELATIVE=head.relative, MATCHES=m > 0,
            HALVINGS=0 if head.places is None else len(head.places).bit_length() - 1,
            BLOCK_H=block_h, BLOCK_M=triton.next_power_of_2(max(m, 1)), BLOCK_S=at_once,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _product(weight_ptr, x_ptr, x_number, row, rows, size, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS] of a packed matrix [rows, size] times a vector in memory."""
    total = tl.full((ROWS,), 0.0, tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column * x_number, mask=column < size, other=0.0)
        mask = (row < rows)[:, None] & (column < size)[None, :]
        weight = tl.load(weight_ptr + row[:, None] * size + column[None, :], mask=mask, other=0.0)
        total += tl.sum(weight * x[None, :], 1)
    return total


@triton.jit
def _map(
    weight_ptr, bias_ptr, x_ptr, x_number, out_ptr, rows, size,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write weight x + bias."""
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        found = _product(weight_ptr, x_ptr, x_number, row, rows, size, BLOCK, ROWS)
        found += tl.load(bias_ptr + row, mask=row < rows, other=0.0)
        tl.store(out_ptr + row, found.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _advance_kernel(
    came_ptr, state_ptr, memory_ptr, newest_ptr, query_ptr, hidden_ptr, hidden_bias_ptr,
    inner_ptr, inner_bias_ptr, address_ptr, address_bias_ptr, asks_ptr, asks_bias_ptr,
    h, m, asked, came_sample, came_number, state_sample, state_number,
    memory_sample, memory_token, newest_sample,
    GATED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    came_ptr += sample * came_sample
    state_ptr += sample * state_sample
    row = tl.arange(0, BLOCK_H)
    mask = row < h
    if GATED:
        past = _product(hidden_ptr, state_ptr, state_number, row, h, h, BLOCK, BLOCK_H)
        past += tl.load(hidden_bias_ptr + row, mask=mask, other=0.0)
        reset = _sigmoid(tl.load(came_ptr + row * came_number, mask=mask, other=0.0) + past)
        past = _product(hidden_ptr + h * h, state_ptr, state_number, row, h, h, BLOCK, BLOCK_H)
        past += tl.load(hidden_bias_ptr + h + row, mask=mask, other=0.0)
        update = tl.load(came_ptr + (h + row) * came_number, mask=mask, other=0.0)
        update = _sigmoid(update + past)
        past = _product(hidden_ptr + 2 * h * h, state_ptr, state_number, row, h, h, BLOCK, BLOCK_H)
        past += tl.load(hidden_bias_ptr + 2 * h + row, mask=mask, other=0.0)
        new = tl.load(came_ptr + (2 * h + row) * came_number, mask=mask, other=0.0)
        new = _tanh(new + reset * past)
        old = tl.load(state_ptr + row * state_number, mask=mask, other=0.0)
        z = (1.0 - update) * new + update * old
    else:
        z = _tanh(tl.load(came_ptr + row * came_number, mask=mask, other=0.0))
    tl.debug_barrier()  # the old state was read by all threads
    tl.store(state_ptr + row * state_number, z, mask=mask)
    tl.debug_barrier()  # and now all can read the new one
    newest = tl.load(newest_ptr + sample * newest_sample).to(tl.int64)
    memory_ptr += sample * memory_sample + newest * memory_token
    _map(inner_ptr, inner_bias_ptr, state_ptr, state_number, memory_ptr, h, h, BLOCK, 64)
    _map(address_ptr, address_bias_ptr, state_ptr, state_number, memory_ptr + h, m, h, BLOCK, 64)
    query_ptr += sample * asked
    _map(asks_ptr, asks_bias_ptr, state_ptr, state_number, query_ptr, asked, h, BLOCK, 64)


@triton.jit(do_not_specialize=["count", "out_layer"])
def _score_kernel(
    memory_ptr, query_ptr, newest_ptr, positions_ptr, weight_ptr, bias_ptr, places_ptr, edges_ptr,
    out_ptr, out_layer, count, layers, h, m, scale,
    memory_sample, memory_token, query_sample, query_number, newest_sample,
    positions_sample, positions_row,
    GIVEN: tl.constexpr, PLACED: tl.constexpr, RELATIVE: tl.constexpr, MATCHES: tl.constexpr,
    HALVINGS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = row < count
    if GIVEN:
        place_at = positions_ptr + sample * positions_sample + row.to(tl.int64) * positions_row
        place = tl.load(place_at, mask=live, other=0).to(tl.int64)
    else:
        place = row.to(tl.int64)
    token_ptr = memory_ptr + sample * memory_sample + place * memory_token
    column = tl.arange(0, BLOCK_H)
    mask = live[:, None] & (column < h)[None, :]
    key = tl.load(token_ptr[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if PLACED:
        if RELATIVE:
            place = tl.load(newest_ptr + sample * newest_sample).to(tl.int64) - place
        bucket = tl.full((BLOCK_S,), 0, tl.int32)
        for halving in tl.static_range(HALVINGS):
            further = bucket + (1 << (HALVINGS - 1 - halving))
            edge = tl.load(edges_ptr + further - 1).to(tl.int64)
            bucket = tl.where(place >= edge, further, bucket)
        key += tl.load(places_ptr + bucket[:, None] * h + column[None, :], mask=mask, other=0.0)
    key = tl.maximum(key, 0.0)
    if MATCHES:
        number = tl.arange(0, BLOCK_M)
        address_at = token_ptr[:, None] + (h + number)[None, :]
        mask = live[:, None] & (number < m)[None, :]
        address = tl.load(address_at, mask=mask, other=0.0).to(tl.float32)
    out_ptr += sample * count + row
    for layer in range(layers):
        weight = tl.load(weight_ptr + layer * h + column, mask=column < h, other=0.0)
        found = tl.sum(key * weight[None, :], 1) + tl.load(bias_ptr + layer)
        if MATCHES:
            asks = query_ptr + sample * query_sample + (layer * m + number) * query_number
            asks = tl.load(asks, mask=number < m, other=0.0)
            found += tl.sum(address * asks[None, :], 1) * scale
        tl.store(out_ptr, found, mask=live)
        out_ptr += out_layer
