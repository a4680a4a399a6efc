"""What a Block Transformer costs, from its sizes alone. Pure Python (see kvlab.methods.cost)."""

from __future__ import annotations

from collections.abc import Callable

from kvlab.methods.axis import Method
from kvlab.methods.block_transformer.params import BlockTransformerParams
from kvlab.methods.block_transformer.sizes import sizes
from kvlab.methods.cost import Cost
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.cost import DecoderCost, causal_pairs
from kvlab.methods.registry import resolve

ID = 4
"""Bytes of a token's id."""


class BlockCost(Cost):
    """Cost of embedder, block decoder, expansion and token decoder.

    All axes but granularity act on the block decoder, counted in blocks. What is done once a block
    is divided evenly among its tokens.
    """

    def __init__(self, config: DecoderConfig, method: Method) -> None:
        params = method["granularity"].params
        assert isinstance(params, BlockTransformerParams)
        self.params, self.sizes = params, sizes(config, params)
        self.length = params.block_length
        self.block = DecoderCost(method.acting(config), method, tables=False)
        self.token = DecoderCost(self.sizes.token, resolve({}))

    def body_parameters(self) -> int:
        bias = self._expansion() and self.sizes.vectors * self.sizes.token.width
        parts = self.block.body_parameters() + self.token.body_parameters()
        return parts + self._expansion() + bias + self._embedder_body() + self._cross_parameters()

    def total_parameters(self) -> int:
        token_tables = self.token.total_parameters() - self.token.body_parameters()
        table = self.sizes.block.vocab_size * self.sizes.embedding_width
        return self.body_parameters() + table + token_tables

    def train_flops_per_token(self, sequence_length: int) -> float:
        return self._over_text(sequence_length, self.block.train_flops_per_token, 3)

    def score_flops_per_token(self, sequence_length: int) -> float:
        return self._over_text(sequence_length, self.block.score_flops_per_token, 1)

    def score_steps(self, sequence_length: int) -> int:
        steps = self.block.score_steps(self._blocks(sequence_length))
        return 1 if steps == 1 else sequence_length

    def prefill_flops(self, prompt: int) -> float:
        blocks = self._blocks(prompt)
        lead = self.sizes.rows - self.length + 1
        inside = self._token_flops(lead) + self.token.head_flops()
        return blocks * self._embedder_flops() + self.block.prefill_flops(blocks) + inside

    def decode_flops(self, context: int, prompt: int | None = None) -> float:
        places = self._blocks(context), self._prompt(prompt)
        block = self._embedder_flops() + self.block.decode_flops(*places)
        return (block + self._token_flops(self.sizes.rows)) / self.length + self.token.head_flops()

    def kv_bytes(self, tokens: int, itemsize: int, prompt: int | None = None) -> int:
        inside = self.token.kv_bytes(self.sizes.rows + self._memory(), itemsize)
        blocks = self.block.kv_bytes(self._blocks(tokens), itemsize, self._prompt(prompt))
        return blocks + inside

    def kv_bytes_read_per_token(
        self, context: int, itemsize: int, prompt: int | None = None
    ) -> float:
        lead = self.sizes.rows - self.length + 1
        rows = sum(range(lead, self.sizes.rows + 1)) + self.length * self._memory()
        block = self.block.kv_bytes_read_per_token(
            self._blocks(context), itemsize, self._prompt(prompt)
        )
        return (block + rows * self.token.kv_bytes(1, itemsize)) / self.length

    def first_target(self) -> int:
        return self.length

    def _over_text(self, tokens: int, block: Callable[[int], float], times: int) -> float:
        """FLOPs per token of `block` per block and of so many forward passes of all else."""
        predicting = self._blocks(tokens) - 1  # the last block is predicted, not read
        if predicting < 1:
            return 0.0
        inside = self._token_flops(self.sizes.rows) + self.length * self.token.head_flops()
        each = block(predicting) + times * (self._embedder_flops() + inside)
        return predicting * each / tokens

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.length)

    def _prompt(self, prompt: int | None) -> int | None:
        return None if prompt is None else self._blocks(prompt)

    def _memory(self) -> int:
        """Vectors that cross-attention keeps keys and values of, per layer."""
        return self.sizes.vectors if self.params.token_decoder == "cross_attention" else 0

    def _expansion(self) -> int:
        """Weights of the expansion."""
        outputs = self.sizes.vectors * self.sizes.token.width
        return self.sizes.block.width * outputs if self.params.expansion == "linear" else 0

    def _token_flops(self, rows: int) -> float:
        """FLOPs of one block's first rows in the token decoder, expansion included, head not."""
        c = self.sizes.token
        flops = 2.0 * self._expansion() + self.token.linear_flops(rows)
        flops += self.token.attention_flops(c.layers * causal_pairs(rows, None))
        if memory := self._memory():
            for_rows, for_memory = self._cross_weights()
            flops += 2.0 * c.layers * (rows * for_rows + memory * for_memory)
            flops += self.token.attention_flops(c.layers * rows * memory)
        return flops

    def _cross_weights(self) -> tuple[int, int]:
        """Weights of one cross-attention that each row and each memory vector goes through."""
        c = self.sizes.token
        return 2 * c.width * c.heads * c.head_dim, 2 * c.width * c.kv_heads * c.head_dim

    def _cross_parameters(self) -> int:
        if not self._memory():
            return 0
        c = self.sizes.token
        norm = c.width * (2 if c.norm == "layer" else 1)
        biases = (c.heads + 2 * c.kv_heads) * c.head_dim * c.qkv_bias + c.width * c.out_bias
        return c.layers * (sum(self._cross_weights()) + norm + biases)

    def _encoder(self) -> tuple[int, int]:
        """Rows of the small encoder and those of its outputs that are kept; (0, 0) without one."""
        if self.sizes.embedder == "encoder":
            return self.length, self.length
        if self.sizes.embedder == "cls":
            return self.length + self.params.cls_tokens, self.params.cls_tokens
        return 0, 0

    def _embedder_body(self) -> int:
        width, out = self.sizes.embedding_width, self.sizes.block.width
        if self.sizes.embedder == "lookup":
            return 0
        if self.sizes.embedder == "projection":
            return width * self.length * out + out
        rows, kept = self._encoder()
        per_layer = 12 * width * width + 13 * width
        places = rows * width + 2 * width
        return self.params.encoder_layers * per_layer + places + kept * width * out + out

    def _embedder_flops(self) -> float:
        """FLOPs of one block embedding."""
        width, out = self.sizes.embedding_width, self.sizes.block.width
        if self.sizes.embedder == "lookup":
            return 0.0
        if self.sizes.embedder == "projection":
            return 2.0 * width * self.length * out
        rows, kept = self._encoder()
        per_layer = rows * (2.0 * 12 * width * width + 4.0 * rows * width)
        return self.params.encoder_layers * per_layer + 2.0 * kept * width * out


def cost(config: DecoderConfig, method: Method) -> Cost:
    """Return the cost of a Block Transformer."""
    return BlockCost(config, method)


def state_bytes(config: DecoderConfig, method: Method, itemsize: int) -> int:
    """Bytes that a server keeps of a request beside its blocks: the block in the making.

    Its tokens (int32), and the keys and values of the token decoder.
    """
    params = method["granularity"].params
    found = sizes(config, params)
    token = found.token
    rows = token.layers * 2 * token.kv_heads * found.rows * token.head_dim
    return int(params.block_length * ID + rows * itemsize)


def unserved(method: Method) -> str | None:
    """Say why a server's engine cannot run it; None where it can."""
    kind = method["granularity"].params.token_decoder
    if kind == "prefix":
        return None
    return f"a token decoder of kind '{kind}' cannot be served: train with token_decoder: prefix"
