"""The Block Transformer: embedder, decoder over blocks, decoder inside a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels.attention import EMPTY
from kvlab.methods.axis import Method
from kvlab.methods.block_transformer.embedder import build_embedder
from kvlab.methods.block_transformer.packing import BlockPacker
from kvlab.methods.block_transformer.params import BlockTransformerParams
from kvlab.methods.block_transformer.sizes import sizes
from kvlab.methods.block_transformer.token_decoder import build_token_decoder
from kvlab.methods.cache.opening import one_pass_cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.model import LanguageModel, Score, Session
from kvlab.methods.packing import Documents, Packer
from kvlab.methods.prefill.params import prefill_of

if TYPE_CHECKING:
    from kvlab.methods.cache.ragged import RaggedCache


class BlockTransformer(LanguageModel):
    """Block i becomes a vector; the block decoder's output there predicts all of block i + 1.

    The first block is never predicted. Source: arXiv 2406.02657.

    Args:
        config: of the decoder whose layers are divided between the two (see `sizes`).
        method: whose granularity is `block_transformer`.
    """

    def __init__(self, config: DecoderConfig, method: Method) -> None:
        super().__init__()
        params = method["granularity"].params
        assert isinstance(params, BlockTransformerParams)
        self.config, self.method, self.params = config, method, params
        self.sizes = sizes(config, params)
        self.embedder = build_embedder(self.sizes, params)
        self.block_decoder = Decoder(method.acting(config), embeddings=False, head=False)
        self.token_decoder = build_token_decoder(self.sizes, params)

    @classmethod
    def convert(cls, parent: LanguageModel, method: Method) -> LanguageModel:
        from kvlab.methods.block_transformer.convert import convert

        return convert(parent, method)

    @classmethod
    def packer(
        cls, method: Method, documents: Documents, sequence_length: int, *, eos: int, seed: int = 0
    ) -> Packer:
        params = method["granularity"].params
        assert isinstance(params, BlockTransformerParams)
        return BlockPacker(
            documents,
            sequence_length,
            eos=eos,
            seed=seed,
            block_length=params.block_length,
            random_padding=params.random_padding,
            pad_to_block_boundary=params.pad_to_block_boundary,
        )

    def forward(
        self, ids: Tensor, valid: Tensor | None = None, apply: Method | None = None
    ) -> Score:
        blocks, real = self.blocks(ids, valid)
        hidden = self._predict(blocks, real, apply)
        nll = self.token_decoder.decoder.nll(hidden.flatten(1, 2), blocks[:, 1:].flatten(1))
        scored = self.scored(blocks, real)
        nll = F.pad(nll, (self.params.block_length, 0)).masked_fill(~scored, 0.0)
        tokens = ids.shape[1]
        return Score(nll[:, :tokens], scored[:, :tokens])

    def logits(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return [B, n - 1, L_B, V] for n blocks: entry [i, j] predicts token (i + 1) L_B + j.

        Arguments are those of `forward`; entries of padding hold nothing meaningful.
        """
        blocks, real = self.blocks(ids, valid)
        return self.token_decoder.decoder.head(self._predict(blocks, real))

    def predictions(self, ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = ids.shape[1]
        logits = self.logits(ids, valid).flatten(1, 2)
        logits = F.pad(logits, (0, 0, self.params.block_length, 0))
        return logits[:, :tokens], self.scored(*self.blocks(ids, valid))[:, :tokens]

    def blocks(self, ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cut ids [B, T] into blocks [B, n, L_B], the tail padded; valid likewise, or None.

        A padded tail needs no mask: it stands after everything that is scored.
        """
        length = self.params.block_length
        missing = -ids.shape[1] % length
        blocks = torch.unflatten(
            F.pad(ids, (0, missing), value=self.config.pad_id), 1, (-1, length)
        )
        if valid is None:
            return blocks, None
        real = torch.unflatten(F.pad(valid, (0, missing), value=False), 1, (-1, length))
        return blocks.masked_fill(~real, self.config.pad_id), real

    def contexts(self, blocks: Tensor, real: Tensor | None, apply: Method | None = None) -> Tensor:
        """Return the block decoder's output [B, n, D] over blocks [B, n, L_B]."""
        return self.block_decoder.body(
            self.embedder(blocks),
            block_positions(real),
            one_pass_cache(self.acting, apply),
            passes=prefill_of(apply).passes,
        )

    def scored(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        """Return [B, n L_B] bool: real tokens whose block follows a block that holds something."""
        if real is None:
            scored = torch.ones_like(blocks, dtype=torch.bool)
            scored[:, 0] = False
        else:
            scored = real.clone()
            scored[:, 0] = False
            scored[:, 1:] &= real[:, :-1].any(-1, keepdim=True)
        return scored.flatten(1)

    def start(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        *,
        new_tokens: int,
        apply: Method | None = None,
    ) -> Session:
        from kvlab.methods.block_transformer.session import BlockSession

        return BlockSession(self, ids, valid, new_tokens, apply)

    def serve(
        self, ids: Tensor, positions: Tensor, cache: RaggedCache, passes: int | None = None
    ) -> Tensor:
        from kvlab.methods.block_transformer.serving import serve

        return serve(self, ids, positions, cache, passes)

    def head_of(self, hidden: Tensor) -> Tensor:
        return self.token_decoder.decoder.head(hidden)

    @property
    def rotation(self) -> Tensor:
        return self.block_decoder.frequencies

    @property
    def acting(self) -> DecoderConfig:
        return self.block_decoder.config

    def checkpoint_gradients(self, on: bool) -> None:
        self.block_decoder.checkpoint_gradients(on)
        self.token_decoder.decoder.checkpoint_gradients(on)

    def body_parameters(self) -> int:
        decoder = self.token_decoder.decoder
        tables = (self.embedder.table, decoder.embedding, decoder.output)
        outside = sum(table.weight.numel() for table in tables if table is not None)
        return sum(p.numel() for p in self.parameters()) - outside

    def describe(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "method": self.method.to_dict()}

    def _predict(self, blocks: Tensor, real: Tensor | None, apply: Method | None = None) -> Tensor:
        """Return [B, n - 1, L_B, D_t], what the head predicts the blocks but the first from."""
        if blocks.shape[1] == 1:
            nothing = (len(blocks), 0, self.params.block_length, self.sizes.token.width)
            return self.embedder.table.weight.new_empty(nothing)
        context = self.contexts(blocks[:, :-1], None if real is None else real[:, :-1], apply)
        hidden = self.token_decoder(
            context.flatten(0, 1),
            blocks[:, 1:].flatten(0, 1),
            None if real is None else real[:, 1:].flatten(0, 1),
        )
        return torch.unflatten(hidden, 0, context.shape[:2])


def block_positions(real: Tensor | None) -> Tensor | None:
    """Positions [B, n] of blocks whose tokens `real` [B, n, L_B] marks; None for None.

    Counted from each sample's first block that holds something; EMPTY where a block is all padding.
    """
    if real is None:
        return None
    holds = real.any(-1)
    leading = (holds.long().cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(real.shape[1], device=real.device) - leading
    return places.masked_fill(~holds, EMPTY)
