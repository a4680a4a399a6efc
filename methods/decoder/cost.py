"""Cost of a decoder: parameters, FLOPs and KV bytes from its sizes. Pure Python."""

from __future__ import annotations

import importlib
from types import ModuleType

from kvlab.methods.axis import Choice, Method, refuse_unread
from kvlab.methods.cost import Cost
from kvlab.methods.decoder.config import DecoderConfig


class DecoderCost(Cost):
    """Cost of one decoder whose positions are tokens (or blocks: then read "block" for "token").

    Args:
        config: its sizes.
        method: whose eviction decides what each layer keeps.
        tables: whether it has the vocabulary tables; a decoder over block embeddings has none.
    """

    def __init__(self, config: DecoderConfig, method: Method, *, tables: bool = True) -> None:
        refuse_unread(method)
        self.config, self.method, self.tables = config, method, tables
        self._eviction = _module(method["eviction"])
        precision = method.choices.get("precision")
        self._precision = None if precision is None else _module(precision)
        self._windows = config.windows or (None,) * config.layers

    def rows(self, tokens: int) -> list[int]:
        """Rows that each layer keeps of a sequence of so many tokens, and a query reads."""
        kept = [
            self._eviction.rows(self.config, self.method, layer, tokens)
            for layer in range(self.config.layers)
        ]
        return [min(n, window or n) for n, window in zip(kept, self._windows, strict=True)]

    def row_bytes(self, itemsize: int) -> float:
        """Bytes of one row of one KV layer, keys and values, at the method's precision."""
        if self._precision is None:
            return 2 * self.config.kv_heads * self.config.head_dim * itemsize
        found: float = self._precision.row_bytes(self.config, self.method, itemsize)
        return found

    def linear_parameters(self) -> int:
        """Weights of the layers' linear maps: each is 2 FLOPs per row."""
        c = self.config
        attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        return c.layers * (attention + c.width * c.ffn_width * (3 if c.gated else 2))

    def body_parameters(self) -> int:
        c = self.config
        norm = c.width * (2 if c.norm == "layer" else 1)
        biases = c.head_dim * (c.heads + 2 * c.kv_heads) * c.qkv_bias + c.width * c.out_bias
        biases += (c.ffn_width * (2 if c.gated else 1) + c.width) * c.mlp_bias
        per_layer = 2 * norm + biases + 2 * c.head_dim * c.qk_norm
        return self.linear_parameters() + c.layers * per_layer + norm

    def total_parameters(self) -> int:
        c = self.config
        tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.width if self.tables else 0
        return self.body_parameters() + tables

    def head_flops(self) -> float:
        """FLOPs of one row of logits."""
        return 2.0 * self.config.vocab_size * self.config.width if self.tables else 0.0

    def linear_flops(self, rows: int = 1) -> float:
        """FLOPs of the layers' linear maps for so many rows."""
        return 2.0 * self.linear_parameters() * rows

    def attention_flops(self, pairs: int) -> float:
        """FLOPs of so many (query, key) pairs of one layer: scores and weighted values."""
        return 4.0 * self.config.heads * self.config.head_dim * pairs

    def train_flops_per_token(self, sequence_length: int) -> float:
        pairs = sum(causal_pairs(sequence_length, window) for window in self._windows)
        body = self.linear_flops() + self.attention_flops(pairs) / sequence_length
        return 3.0 * (body + self.head_flops())

    def prefill_flops(self, prompt: int) -> float:
        windows = []
        for layer, own in enumerate(self._windows):
            window = self._eviction.prompt_window(self.config, self.method, layer)
            windows.append(min((w for w in (window, own) if w), default=None))
        pairs = sum(causal_pairs(prompt, window) for window in windows)
        return self.linear_flops(prompt) + self.attention_flops(pairs) + self.head_flops()

    def decode_flops(self, context: int) -> float:
        attention = self.attention_flops(sum(self.rows(context)))
        return self.linear_flops() + attention + self.head_flops()

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        return round(self.row_bytes(itemsize) * sum(self.rows(tokens)))

    def kv_bytes_read_per_token(self, context: int, itemsize: int) -> float:
        return float(self.kv_bytes(context, itemsize))

    def first_target(self) -> int:
        return 1


def cost(config: DecoderConfig, method: Method) -> Cost:
    """Return the cost of an ordinary decoder over tokens."""
    return DecoderCost(config, method)


def _module(choice: Choice) -> ModuleType:
    """The cost module of an axis value."""
    if choice.value.cost is None:
        raise ValueError(f"method '{choice.value.name}' has no cost module")
    return importlib.import_module(choice.value.cost)


def causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs (query, key) that a causal pass over so many tokens reads."""
    w = tokens if window is None else min(window, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w
