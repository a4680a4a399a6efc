"""The token decoder: from one context vector to the L_B tokens of the next block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.kernels.attention import EMPTY
from kvlab.methods.block_transformer.cross_attention import CrossAttendingDecoder
from kvlab.methods.block_transformer.embedder import fan_in_linear
from kvlab.methods.block_transformer.params import BlockTransformerParams
from kvlab.methods.block_transformer.rows import BlockRows, MaskedPass, RequestRows
from kvlab.methods.block_transformer.sizes import Sizes
from kvlab.methods.cache.interface import Cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.model import Decoder


class Expansion(nn.Module):
    """A context vector as the vectors that the token decoder reads: [..., D] -> [..., n, D_t]."""

    def __init__(self, sizes: Sizes, linear: bool) -> None:
        super().__init__()
        self.vectors = sizes.vectors
        inputs, outputs = sizes.block.width, sizes.vectors * sizes.token.width
        self.linear = fan_in_linear(inputs, outputs) if linear else None

    def forward(self, context: Tensor) -> Tensor:
        if self.linear is None:
            return context.unsqueeze(-2).expand(*context.shape[:-1], self.vectors, -1)
        return torch.unflatten(self.linear(context), -1, (self.vectors, -1))


class TokenDecoder(nn.Module):
    """Vectors as a prefix in front of the tokens; and what every kind of token decoder does.

    M blocks are a batch; no row reads another block. `first` and then `append` give, row by row,
    what `forward` gives at once: rows have the same positions in both.
    """

    def __init__(self, sizes: Sizes, params: BlockTransformerParams) -> None:
        super().__init__()
        self.rows = sizes.rows
        self.lead = sizes.rows - params.block_length + 1
        self.expansion = Expansion(sizes, params.expansion == "linear")
        self.decoder = self._decoder(sizes.token)

    def forward(self, context: Tensor, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Run M blocks at once.

        Args:
            context: [M, D], of the block before each.
            tokens: [M, L_B], the block itself.
            valid: [M, L_B] bool, false on padding; None where there is none.

        Returns:
            [M, L_B, D_t]: row j is what the head predicts token j from.
        """
        vectors = self.expansion(context)
        hidden = self._inputs(vectors, tokens[:, :-1])
        positions, cache = None, None
        if valid is not None:
            positions = torch.arange(self.rows, device=tokens.device).expand(len(tokens), -1)
            real = F.pad(valid[:, :-1], (self.lead, 0), value=True)
            cache = MaskedPass(self.decoder.config, positions.masked_fill(~real, EMPTY))
        return self._run(hidden, positions, cache, self._memory(vectors))[:, self.lead - 1 :]

    def open(self, batch: int) -> BlockRows:
        """Return the storages of a block in generation."""
        like = self.decoder.norm.weight
        assert isinstance(like, Tensor)
        return BlockRows(self.decoder.config, batch, self.rows, like.device, like.dtype)

    def first(self, context: Tensor, rows: BlockRows) -> Tensor:
        """Begin the block after `context` [B, D]; return the row [B, D_t] of its first token."""
        vectors = self.expansion(context)
        rows.begin(vectors, self._memory(vectors))
        none = torch.empty(len(context), 0, dtype=torch.long, device=context.device)
        hidden = self._inputs(vectors, none)
        return self._run(hidden, None, rows, rows.memory)[:, -1]

    def append(self, tokens: Tensor, place: int, rows: BlockRows) -> Tensor:
        """Give the block its `place`-th token [B] (from 0); return the row of the next."""
        hidden = self._input(tokens, place, rows.vectors).unsqueeze(1)
        position = torch.full_like(tokens, self.lead + place).unsqueeze(1)
        return self._run(hidden, position, rows, rows.memory)[:, -1]

    def append_at(self, tokens: Tensor, places: Tensor, rows: RequestRows) -> Tensor:
        """Do as `append` does for blocks at different places [B]."""
        rows.row = (self.lead + places).clamp_max(self.rows - 1)
        hidden = self.decoder.embed(tokens).unsqueeze(1)
        return self.decoder.body(hidden, rows.row.unsqueeze(1), rows)[:, -1]

    def _decoder(self, config: DecoderConfig) -> Decoder:
        return Decoder(config)

    def _inputs(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat((vectors, self.decoder.embed(tokens)), dim=1)

    def _input(self, tokens: Tensor, place: int, vectors: Tensor) -> Tensor:
        return self.decoder.embed(tokens)

    def _memory(self, vectors: Tensor) -> list[Tensor]:
        return []

    def _run(
        self, hidden: Tensor, positions: Tensor | None, cache: Cache | None, memory: list[Tensor]
    ) -> Tensor:
        return self.decoder.body(hidden, positions, cache)


class SummationDecoder(TokenDecoder):
    """Vector j added to the embedding of the token before place j; BOS before place 0."""

    def _inputs(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        rows = self.decoder.embed(F.pad(tokens, (1, 0), value=self.decoder.config.bos_id))
        return rows + vectors[:, : rows.shape[1]]

    def _input(self, tokens: Tensor, place: int, vectors: Tensor) -> Tensor:
        return self.decoder.embed(tokens) + vectors[:, place + 1]


class CrossDecoder(TokenDecoder):
    """Vectors read by cross-attention in front of every layer; BOS before place 0."""

    decoder: CrossAttendingDecoder

    def _decoder(self, config: DecoderConfig) -> Decoder:
        return CrossAttendingDecoder(config)

    def _inputs(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder.embed(F.pad(tokens, (1, 0), value=self.decoder.config.bos_id))

    def _memory(self, vectors: Tensor) -> list[Tensor]:
        return self.decoder.memory(vectors)

    def _run(
        self, hidden: Tensor, positions: Tensor | None, cache: Cache | None, memory: list[Tensor]
    ) -> Tensor:
        return self.decoder.body_over(hidden, memory, positions, cache)


def build_token_decoder(sizes: Sizes, params: BlockTransformerParams) -> TokenDecoder:
    """Return the token decoder that the params ask for."""
    kinds = {"prefix": TokenDecoder, "summation": SummationDecoder, "cross_attention": CrossDecoder}
    return kinds[params.token_decoder](sizes, params)
