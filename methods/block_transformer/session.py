"""Generation: one block decoder step per block, one token decoder step per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.block_transformer.model import BlockTransformer, block_positions
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.model import Session, refuse_padding_behind
from kvlab.methods.prefill.params import prefill_of


class BlockSession(Session):
    """A batch of sequences over a cache of blocks and the rows of the block in the making.

    Prompts are padded on the left to whole blocks, so all samples meet block boundaries together
    and the prompt itself never goes through the token decoder. Run-time axes act on the block
    decoder, counted in blocks. Rows of the token decoder stand at the positions they have in
    `forward` (the reference's generate puts the whole prefix at position 0).
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: BlockTransformer,
        ids: Tensor,
        valid: Tensor | None,
        new_tokens: int,
        apply: Method | None,
    ) -> None:
        refuse_padding_behind(valid)
        batch, tokens = ids.shape
        length, pad = model.params.block_length, model.config.pad_id
        self._model, self._length, self.period = model, length, length
        self._prompt = torch.tensor(batch * tokens) if valid is None else valid.sum()
        self._steps = 0

        missing = -tokens % length
        blocks, real = model.blocks(
            F.pad(ids, (missing, 0), value=pad),
            None if valid is None else F.pad(valid, (missing, 0), value=False),
        )
        count = blocks.shape[1]
        # Every sample has a token in the last block, so a lone block is never all padding.
        positions = block_positions(real) if count > 1 else None
        embedded = model.embedder(blocks)
        self._cache = open_cache(
            model.acting,
            apply,
            batch=batch,
            tokens=count + new_tokens // length,
            device=embedded.device,
            dtype=embedded.dtype,
        )
        self._rows = model.token_decoder.open(batch)
        self._tokens = torch.full((batch, length), pad, device=ids.device)
        self._place = 0
        if positions is None:
            self._next = torch.full((batch, 1), count, device=ids.device)
        else:
            self._next = positions[:, -1:] + 1
        prefill = prefill_of(apply)
        context = model.block_decoder.body(
            embedded,
            positions,
            self._cache,
            passes=prefill.passes,
            exit_early=model.block_decoder.exits_early(prefill.early_exit, self._cache),
        )[:, -1]
        self._show(model.token_decoder.first(context, self._rows))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        self._steps += 1
        self._tokens[:, self._place] = tokens
        place = self._place
        self._place = (place + 1) % self._length
        decoder = self._model.token_decoder
        if self._place:
            return self._show(decoder.append(tokens, place, self._rows))
        return self._show(decoder.first(self._close_block(), self._rows))

    def freeze(self) -> bool:
        return self._cache.freeze()

    def thaw(self) -> None:
        self._cache.thaw()

    def advance(self) -> None:
        self._cache.advance(1)
        self._steps += self._length

    def parts(self) -> list[object]:
        return [self, self._rows, *self._cache.parts()]

    def kv_bytes(self) -> int:
        return self._cache.nbytes() + self._rows.nbytes()

    def kv_tokens(self) -> int:
        return int(self._prompt) + self._steps * len(self._tokens)

    def _close_block(self) -> Tensor:
        """Run the block decoder over the block just completed; return its context [B, D]."""
        embedded = self._model.embedder(self._tokens).unsqueeze(1)
        context = self._model.block_decoder.body(embedded, self._next, self._cache)
        self._next += 1
        return context[:, -1]

    def _show(self, hidden: Tensor) -> Tensor:
        self.logits = self._model.token_decoder.decoder.head(hidden)
        return self.logits
