"""From a block of tokens to one vector: lookup, lookup + projection, and the small encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab.methods.block_transformer.params import BlockTransformerParams
from kvlab.methods.block_transformer.sizes import Sizes

HEAD_DIM = 32


class Embedder(nn.Module):
    """Maps token ids [..., L_B] to block embeddings [..., D]; has one vocabulary table."""

    table: nn.Embedding


class LookupEmbedder(Embedder):
    """Rows of width D / L_B, concatenated in token order. No norm, no position (fact 1.2).

    Padding is an ordinary id here, as in the reference.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.block.vocab_size, sizes.embedding_width)
        nn.init.normal_(self.table.weight, std=sizes.block.init_std)

    def forward(self, blocks: Tensor) -> Tensor:
        return torch.as_tensor(self.table(blocks)).flatten(-2)


class ProjectionEmbedder(LookupEmbedder):
    """Rows of any width d, then one linear layer over the concatenated block."""

    def __init__(self, sizes: Sizes, length: int) -> None:
        super().__init__(sizes)
        self.projection = fan_in_linear(sizes.embedding_width * length, sizes.block.width)

    def forward(self, blocks: Tensor) -> Tensor:
        return torch.as_tensor(self.projection(super().forward(blocks)))


class EncoderEmbedder(Embedder):
    """A bidirectional encoder inside the block, its outputs concatenated and projected.

    Args:
        sizes: of the model; its embedding width is the encoder's width.
        length: L_B.
        layers: of the encoder.
        cls: 0 keeps the outputs of the L_B tokens; otherwise so many rows of the beginning-of-text
            id stand in front and theirs alone are kept, so that the projection does not depend on
            L_B.
    """

    def __init__(self, sizes: Sizes, length: int, layers: int, cls: int) -> None:
        super().__init__()
        width = sizes.embedding_width
        self.cls, self.bos = cls, sizes.block.bos_id
        self.table = nn.Embedding(sizes.block.vocab_size, width)
        self.places = nn.Embedding(length + cls, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=sizes.block.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.projection = fan_in_linear(width * (cls or length), sizes.block.width)

    def forward(self, blocks: Tensor) -> Tensor:
        ids = F.pad(blocks.reshape(-1, blocks.shape[-1]), (self.cls, 0), value=self.bos)
        x = self.norm(self.table(ids) + self.places.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x)
        kept = x[:, : self.cls] if self.cls else x
        return torch.unflatten(self.projection(kept.flatten(1)), 0, blocks.shape[:-1])


class EncoderLayer(nn.Module):
    """A layer of RoBERTa's kind: attention and feed-forward layer, each followed by its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_DIM if width % HEAD_DIM == 0 else 1
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [M, S, W] to the same shape; every row reads every row."""
        qkv = torch.unflatten(self.qkv(x), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return torch.as_tensor(self.mlp_norm(x + self.down(F.gelu(self.up(x)))))


def fan_in_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights N(0, inputs^-1/2) and no bias at first (facts 1.2, 1.4)."""
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


def build_embedder(sizes: Sizes, params: BlockTransformerParams) -> Embedder:
    """Return the embedder that the sizes were resolved for."""
    if sizes.embedder == "lookup":
        return LookupEmbedder(sizes)
    if sizes.embedder == "projection":
        return ProjectionEmbedder(sizes, params.block_length)
    cls = params.cls_tokens if sizes.embedder == "cls" else 0
    return EncoderEmbedder(sizes, params.block_length, params.encoder_layers, cls)
