"""The Block Transformer over a server's requests, each at its own place in its own block."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.methods.block_transformer.rows import RequestRows
from kvlab.methods.cache.ragged import Aim, RaggedCache

if TYPE_CHECKING:
    from kvlab.methods.block_transformer.model import BlockTransformer


def serve(
    model: BlockTransformer, ids: Tensor, positions: Tensor, cache: RaggedCache, passes: int | None
) -> Tensor:
    """Run a step; see `LanguageModel.serve`.

    A prompt is filled up on the left to whole blocks, as in a session. What a request has in the
    making, the tokens of its block and the rows of the token decoder, is state in the cache.
    """
    batch, length = cache.batch, model.params.block_length
    shape = len(ids), model.sizes.token.width
    # Inside a prompt nothing is predicted: whoever asks there must not be told a number.
    out = torch.full(shape, float("nan"), dtype=_dtype(model), device=ids.device)
    tokens = [rows.stop - rows.start for rows in batch.prompts]
    numbers = list(range(len(tokens)))
    prompts = [_filled(ids[rows].long(), length, model.config.pad_id) for rows in batch.prompts]
    whole = list(prompts)
    places = [torch.arange(len(blocks), device=ids.device) for blocks in prompts]
    done = batch.decoding[:0]
    if len(batch.decoding):
        came = positions[batch.decoding] - cache.lengths()
        place = came % length
        making, kv = _unpacked(model, cache.state_of(None))
        making.scatter_(1, place.unsqueeze(1), ids[batch.decoding].long().unsqueeze(1))
        rows = RequestRows(kv)
        out[batch.decoding] = model.token_decoder.append_at(ids[batch.decoding], place, rows)
        done = (place == length - 1).nonzero()[:, 0]
        whole.append(making[done])
        first = -(-cache.lengths()[done] // length)
        places.append(first + came[done] // length)
    contexts = _contexts(model, whole, places, done, cache, passes) if whole else None
    begun = None
    if contexts is not None and len(contexts):
        begun, hidden = _begin(model, contexts)
        lasts = [rows.stop - 1 for rows in batch.prompts]
        out[lasts] = hidden[: len(lasts)]
        out[batch.decoding[done]] = hidden[len(lasts) :]
    if tokens:
        assert begun is not None
        cache.measure(numbers, tokens)
        empty = torch.zeros(len(tokens), length, dtype=torch.long, device=ids.device)
        cache.start(numbers, _packed(empty, begun[: len(tokens)]))
    if len(batch.decoding):
        if begun is not None:
            kv[done] = begun[len(tokens) :]
        cache.keep(None, _packed(making, kv))
    return out


def _filled(ids: Tensor, length: int, pad: int) -> Tensor:
    """Cut a prompt [T] into blocks [n, L_B], padding in front."""
    return F.pad(ids, (-len(ids) % length, 0), value=pad).view(-1, length)


def _contexts(
    model: BlockTransformer,
    whole: list[Tensor],
    places: list[Tensor],
    done: Tensor,
    cache: RaggedCache,
    passes: int | None,
) -> Tensor:
    """Run the block decoder over all that became whole: the last context [P + M, D] of each.

    Args:
        whole: blocks [n, L_B] of each prompt, then the one block of each request in `done`.
        places: where these stand.
    """
    count = len(cache.batch.prompts)
    ends = torch.tensor([0, *(len(blocks) for blocks in whole)]).cumsum(0).tolist()
    spans = [slice(start, stop) for start, stop in pairwise(ends)]
    if not ends[-1]:
        return torch.empty(0, model.sizes.block.width, device=done.device)
    rows = torch.arange(ends[count], ends[-1], device=done.device)
    cache.aim(Aim(tuple(enumerate(spans[:count])), rows, done))
    embedded = model.embedder(torch.cat(whole)).unsqueeze(0)
    hidden = model.block_decoder.body(
        embedded, torch.cat(places).unsqueeze(0), cache, passes=passes
    )
    lasts = torch.tensor([span.stop - 1 for span in spans[:count]], device=done.device)
    return hidden[0, torch.cat((lasts.long(), rows))]


def _begin(model: BlockTransformer, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Begin a block after each context: the rows that its tokens read, and its first row."""
    rows = model.token_decoder.open(len(contexts))
    hidden = model.token_decoder.first(contexts, rows)
    return rows.stored(), hidden


def _packed(making: Tensor, kv: Tensor) -> Tensor:
    """One row of numbers [M, n] of a block's tokens [M, L_B] and its keys and values."""
    ids = making.int().view(kv.dtype)
    return torch.cat((ids, kv.flatten(1)), dim=1)


def _unpacked(model: BlockTransformer, state: Tensor) -> tuple[Tensor, Tensor]:
    config, length = model.sizes.token, model.params.block_length
    ids = length * 4 // state.element_size()
    making = state[:, :ids].contiguous().view(torch.int32).long()
    shape = (config.layers, 2, config.kv_heads, model.sizes.rows, config.head_dim)
    return making, torch.unflatten(state[:, ids:], 1, shape).contiguous()


def _dtype(model: BlockTransformer) -> torch.dtype:
    return next(model.parameters()).dtype
