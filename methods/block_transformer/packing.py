"""Packing for block models: documents padded so that blocks meet document boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.methods.packing import PAD, Documents, Packer, PackingError, Rows


def frame(ids: Tensor, counts: Tensor, *, left: int, block_length: int | None, eos: int) -> Rows:
    """Frame one document: left pad, tokens, one EOS, right pad to the block boundary.

    Args:
        ids, counts: [n], the document.
        left: pads in front, so that a model sees prompts of any length modulo the block length.
        block_length: pad the end to a multiple of it; None: no pad at the end.
        eos: the id that ends the document.

    Returns:
        A stretch [left + n + 1 + right]. Source: reference packer, fact 1.5.
    """
    n = ids.numel()
    real = left + n + 1
    total = real if block_length is None else -(-real // block_length) * block_length
    framed = ids.new_full((total,), PAD)
    framed[left : left + n] = ids
    framed[left + n] = eos
    valid = torch.zeros(total, dtype=torch.bool)
    valid[left:real] = True
    counted = valid.clone()
    counted[left : left + n] = counts
    return Rows(framed, valid, counted)


class BlockPacker(Packer):
    """Rows of whole blocks.

    Args:
        documents, sequence_length, eos, seed: see `Packer`; the sequence length is a multiple of
            the block length.
        block_length: tokens of a block.
        random_padding: 0 to block_length - 1 pads in front of every document, uniformly.
        pad_to_block_boundary: pad every document's end to the next block boundary.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        *,
        eos: int,
        seed: int = 0,
        block_length: int,
        random_padding: bool = True,
        pad_to_block_boundary: bool = True,
    ) -> None:
        if sequence_length % block_length:
            raise PackingError(
                f"sequence_length {sequence_length} is not a multiple of block_length "
                f"{block_length}: choose {sequence_length - sequence_length % block_length} or "
                "another block length"
            )
        self.block_length = block_length
        self.random_padding = random_padding
        self.boundary = block_length if pad_to_block_boundary else None
        super().__init__(documents, sequence_length, eos=eos, seed=seed)

    def draw(self, generator: torch.Generator) -> None:
        high = self.block_length if self.random_padding else 1
        self._left = torch.randint(high, (len(self.documents),), generator=generator)

    def frame(self, ids: Tensor, counts: Tensor, place: int) -> Rows:
        left = int(self._left[place])
        return frame(ids, counts, left=left, block_length=self.boundary, eos=self.eos)
