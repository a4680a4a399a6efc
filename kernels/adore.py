"""What a decode step asks of ADORE's controller (arXiv 2407.02328). Plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.choice import fused
from kvlab.kernels.given import refuse_unlike

INTEGERS = (torch.int32, torch.int64)
KEPT = (torch.float32, torch.bfloat16, torch.float16)


class Cell(NamedTuple):
    """Weights of what a token leaves behind, float32; h numbers of state, m of an address.

    hidden, hidden_bias: [3h, h] and [3h], the GRU's over its last state, in torch's order (reset,
        update, new); None: a token's state is that of the token alone.
    inner, inner_bias: [h, h] and [h], to what scores know of a token.
    address, address_bias: [m, h] and [m]; query, query_bias: [L m, h] and [L m]. m may be 0.
    """

    hidden: Tensor | None
    hidden_bias: Tensor | None
    inner: Tensor
    inner_bias: Tensor
    address: Tensor
    address_bias: Tensor
    query: Tensor
    query_bias: Tensor


class Head(NamedTuple):
    """Weights of the scores of L layers, float32.

    weight, bias: [L, h] and [L].
    places: [n, h], added to what is known of a token by the bucket that it stands in; None: none.
    edges: [n - 1] integer, ascending: bucket i begins at edges[i - 1].
    relative: buckets are of how far back a token stands; else of where it stands in the text.
    """

    weight: Tensor
    bias: Tensor
    places: Tensor | None = None
    edges: Tensor | None = None
    relative: bool = True


def answers(memory: Tensor) -> bool:
    """Whether kernels answer `advance` and `score` over this memory.

    Torch's own GRU and theirs agree but for the last bits.
    """
    return fused(memory) and memory.dtype in KEPT


def advance(cell: Cell, came: Tensor, state: Tensor, memory: Tensor, newest: Tensor) -> Tensor:
    """Take in one token of each sample; return the queries [B, L m] that it asks with.

    In place: the states become those of the tokens, and the memory at their positions what scores
    need of them.

    Args:
        came: [B, 3h] float32, the tokens' inputs through the GRU's input weights and biases; [B, h]
            where there is no GRU.
        state: [B, h] float32.
        memory: [B, P, h + m].
        newest: [B] integer, the tokens' positions, below P.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    if fused(came):
        from kvlab.kernels.gpu import adore as gpu

        return gpu.advance(cell, came, state, memory, newest)
    refuse_cell(cell, came, state, memory, newest)
    if cell.hidden is None:
        state.copy_(came.tanh())
    else:
        reset, update, new = came.chunk(3, dim=1)
        past = F.linear(state, cell.hidden, cell.hidden_bias).chunk(3, dim=1)
        update = torch.sigmoid(update + past[1])
        new = torch.tanh(new + torch.sigmoid(reset + past[0]) * past[2])
        state.copy_((1 - update) * new + update * state)
    key = F.linear(state, cell.inner, cell.inner_bias)
    address = F.linear(state, cell.address, cell.address_bias)
    kept = torch.cat((key, address), dim=1).to(memory.dtype).unsqueeze(1)
    memory.scatter_(1, newest.long()[:, None, None].expand_as(kept), kept)
    return F.linear(state, cell.query, cell.query_bias)


def score(
    head: Head, memory: Tensor, query: Tensor, newest: Tensor, positions: Tensor | int
) -> Tensor:
    """Score tokens for the current ones: [L, B, S] float32 logits.

    Args:
        memory: [B, P, h + m]; query: [B, L m] float32: see `advance`.
        newest: [B] integer, the current tokens' positions.
        positions: [B, S] integer, where the tokens stand, from 0 and below P; or how many of the
            first positions.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    if fused(memory):
        from kvlab.kernels.gpu import adore as gpu

        return gpu.score(head, memory, query, newest, positions)
    refuse_head(head, memory, query, newest, positions)
    hidden = head.weight.shape[1]
    if isinstance(positions, int):
        rows = memory[:, :positions].float()
        place = torch.arange(positions, device=memory.device).unsqueeze(0)
    else:
        place = positions.long()
        rows = memory.gather(1, place.unsqueeze(-1).expand(-1, -1, memory.shape[2])).float()
    key, address = rows[..., :hidden], rows[..., hidden:]
    if head.places is not None and head.edges is not None:
        place = newest.unsqueeze(1) - place if head.relative else place
        key = key + head.places[torch.bucketize(place.contiguous(), head.edges, right=True)]
    found = F.linear(F.relu(key), head.weight, head.bias)
    if address.shape[2]:
        asked = torch.unflatten(query, 1, (len(head.weight), -1))
        found = found + address @ asked.mT * address.shape[2] ** -0.5
    return found.movedim(2, 0)


def refuse_cell(cell: Cell, came: Tensor, state: Tensor, memory: Tensor, newest: Tensor) -> None:
    """Refuse what `advance` cannot take."""
    if state.dim() != 2 or not state.shape[1]:
        raise ValueError(f"state: must be float32 [B, h], found {list(state.shape)}")
    batch, h = state.shape
    m, asked = len(cell.address), len(cell.query)
    gates = 1 if cell.hidden is None else 3
    refuse_unlike("state", state, (batch, h), state)
    refuse_unlike("came", came, (batch, gates * h), state)
    for name, weight, bias, rows in (
        ("hidden", cell.hidden, cell.hidden_bias, 3 * h),
        ("inner", cell.inner, cell.inner_bias, h),
        ("address", cell.address, cell.address_bias, m),
        ("query", cell.query, cell.query_bias, asked),
    ):
        refuse_unlike(f"cell.{name}", weight, (rows, h), state, packed=True)
        refuse_unlike(f"cell.{name}_bias", bias, (rows,), state, packed=True)
    if (cell.hidden is None) != (cell.hidden_bias is None):
        raise ValueError("cell.hidden_bias: must come with cell.hidden")
    if asked % max(m, 1):
        raise ValueError(f"cell.query: must have a multiple of {m} rows, found {asked}")
    _refuse_memory(memory, (batch, h + m), state)
    refuse_unlike("newest", newest, (batch,), state, INTEGERS)


def refuse_head(
    head: Head, memory: Tensor, query: Tensor, newest: Tensor, positions: Tensor | int
) -> None:
    """Refuse what `score` cannot take."""
    if head.weight.dim() != 2:
        raise ValueError(f"head.weight: must be float32 [L, h], found {list(head.weight.shape)}")
    layers, h = head.weight.shape
    batch, m = len(query), query.shape[-1] // max(layers, 1)
    refuse_unlike("head.weight", head.weight, (layers, h), memory, packed=True)
    refuse_unlike("head.bias", head.bias, (layers,), memory, packed=True)
    refuse_unlike("query", query, (batch, layers * m), memory)
    _refuse_memory(memory, (batch, h + m), query)
    refuse_unlike("newest", newest, (batch,), memory, INTEGERS)
    if (head.places is None) != (head.edges is None):
        raise ValueError("head.edges: must come with head.places")
    if head.places is not None:
        buckets = len(head.places)
        if buckets < 2 or buckets & (buckets - 1):
            raise ValueError(f"head.places: must be a power of two of buckets, found {buckets}")
        refuse_unlike("head.places", head.places, (buckets, h), memory, packed=True)
        refuse_unlike("head.edges", head.edges, (buckets - 1,), memory, INTEGERS, packed=True)
    if not isinstance(positions, int):
        rows = positions.shape[-1] if positions.dim() == 2 else 0
        refuse_unlike("positions", positions, (batch, rows), memory, INTEGERS)
    elif not 0 <= positions <= memory.shape[1]:
        raise ValueError(f"positions: must be up to {memory.shape[1]}, found {positions}")


def _refuse_memory(memory: Tensor, outer: tuple[int, int], beside: Tensor) -> None:
    places = memory.shape[1] if memory.dim() == 3 else 0
    refuse_unlike("memory", memory, (outer[0], places, outer[1]), beside, KEPT)
    if memory.stride(2) != 1:
        raise ValueError(f"memory: numbers of a token must be neighbours, found {memory.stride()}")
