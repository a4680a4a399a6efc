"""Cost of a decoder: parameters, FLOPs and KV bytes from its sizes. Pure Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from kvlab.methods.axis import Choice, Method
from kvlab.methods.budget.amount import fixed
from kvlab.methods.cost import Cost
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.segments import exit_layer, passes_of, runs_by_row, segments
from kvlab.methods.prefill.params import prefill_of
from kvlab.methods.registry import refuse_unread

SAMPLES = 256
"""Places of a sequence at most whose decode steps stand for all."""
Windows = Sequence[int | None]
"""Of each layer; None: it reads all."""


class Reading(NamedTuple):
    """How rows that read one another alone go through the layers.

    Attributes:
        windows: through which each layer reads them.
        passes: over layers that read keys from above them; None: row by row, as in decoding.
    """

    rows: int
    windows: Windows
    passes: int | None


class DecoderCost(Cost):
    """Cost of one decoder whose positions are tokens (or blocks: then read "block" for "token").

    A layer that keeps no keys and values has no weights for them, and reads another's rows as any
    layer does: sharing lowers what is kept, not what a token reads. A strict layer (one that reads
    upward, or any under `Sharing.strict`) reads one row fewer than the others.

    Args:
        config: its own sizes, what the method's sharing makes of them included (`Method.acting`).
        method: its run-time axes count: what each layer keeps, and how a prompt is read.
        tables: whether it has the vocabulary tables; a decoder over block embeddings has none.
    """

    def __init__(self, config: DecoderConfig, method: Method, *, tables: bool = True) -> None:
        refuse_unread(method)
        self.config, self.method, self.tables = config, method, tables
        self._eviction = _module(method["eviction"])
        precision = method.choices.get("precision")
        self._precision = _module(precision) if precision and precision.value.cost else None
        self._prefill = prefill_of(method)
        heads = _optional(self._eviction, "heads")
        kept = config.kv_heads if heads is None else heads(config, method)
        self._row = config if kept == config.kv_heads else config.with_(kv_heads=kept)
        eviction = method["eviction"]
        self._grows = eviction.value.grows is not None and eviction.value.grows(eviction.params)
        self._observes_all = any(choice.value.observes_all for choice in method.choices.values())
        self._windows = config.windows or (None,) * config.layers
        self._owners = frozenset(config.kv_of)
        every = config.sharing is not None and config.sharing.strict
        self._strict = [every or kv > layer for layer, kv in enumerate(config.kv_of)]
        cyclic = [part for part in segments(config) if part.cyclic]
        self._cyclic = {layer for part in cyclic for layer in range(part.start, part.stop)}
        self._tops = {part.stop - 1 for part in cyclic}

    def rows(self, tokens: int, prompt: int | None = None) -> dict[int, float]:
        """Rows that each KV layer keeps of a sequence of so many tokens: what a reader may want."""
        kept: dict[int, float] = {}
        for layer, kv in enumerate(self.config.kv_of):
            kept[kv] = max(kept.get(kv, 0), self._seen(layer, tokens, prompt))
        return kept

    def reads(self, tokens: int, prompt: int | None = None) -> list[float]:
        """Rows that each layer reads for the last of so many tokens."""
        return [self._seen(i, tokens, prompt) - strict for i, strict in enumerate(self._strict)]

    def row_bytes(self, itemsize: int) -> float:
        """Bytes of one row of one KV layer, keys and values, at the method's precision."""
        if self._precision is None:
            return 2 * self._row.kv_heads * self._row.head_dim * itemsize
        found: float = self._precision.row_bytes(self._row, self.method, itemsize)
        return found

    def extra_bytes(self, rows: float, itemsize: int) -> float:
        """Bytes of one KV layer of so many rows beside theirs: those that wait to be quantised."""
        says = None if self._precision is None else _optional(self._precision, "extra_bytes")
        return 0.0 if says is None else says(self._row, self.method, rows, itemsize)

    def body_parameters(self) -> int:
        c = self.config
        norm = c.width * (2 if c.norm == "layer" else 1)
        biases = c.head_dim * c.heads * c.qkv_bias + c.width * c.out_bias
        biases += (c.ffn_width * (2 if c.gated else 1) + c.width) * c.mlp_bias
        per_layer = 2 * norm + biases + c.head_dim * c.qk_norm
        per_kv_layer = c.head_dim * (2 * c.kv_heads * c.qkv_bias + c.qk_norm)
        linear = sum(self._weights(layer) for layer in range(c.layers))
        return linear + c.layers * per_layer + len(self._owners) * per_kv_layer + norm

    def total_parameters(self) -> int:
        c = self.config
        tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.width if self.tables else 0
        return self.body_parameters() + tables

    def head_flops(self) -> float:
        """FLOPs of one row of logits."""
        return 2.0 * self.config.vocab_size * self.config.width if self.tables else 0.0

    def linear_flops(self, rows: int = 1) -> float:
        """FLOPs of the layers' linear maps for so many rows, in one pass."""
        return 2.0 * rows * sum(self._weights(layer) for layer in range(self.config.layers))

    def attention_flops(self, pairs: float) -> float:
        """FLOPs of so many (query, key) pairs of one layer: scores and weighted values."""
        return 4.0 * self.config.heads * self.config.head_dim * pairs

    def train_flops_per_token(self, sequence_length: int) -> float:
        reading = self._whole(sequence_length, self._windows)
        every = range(self.config.layers)
        flops = self._forward(every, reading) + sum(self._backward(i, reading) for i in every)
        return flops / sequence_length + 3.0 * self.head_flops()

    def score_flops_per_token(self, sequence_length: int) -> float:
        under = self._fixed(sequence_length)
        if not under.in_one_pass():
            places = range(1, sequence_length + 1, max(1, sequence_length // SAMPLES))
            return sum(under.decode_flops(place, 1) for place in places) / len(places)
        layers = range(self.config.layers)
        windows = [int(under._seen(i, sequence_length, sequence_length)) for i in layers]
        flops = self._forward(layers, self._whole(sequence_length, windows, self._prefill.passes))
        return flops / sequence_length + self.head_flops()

    def score_steps(self, sequence_length: int) -> int:
        return 1 if self._fixed(sequence_length).in_one_pass() else sequence_length

    def in_one_pass(self) -> bool:
        """Whether a parallel pass can read what a live cache would have kept."""
        says = _optional(self._eviction, "in_one_pass")
        plain = self._precision is None or self.method["precision"].is_default
        return plain and says is not None and says(self.config, self.method)

    def prefill_flops(self, prompt: int) -> float:
        layers, windows = self.config.layers, self._prompt_windows()
        last = self._exit()
        flops = self._forward(range(last), self._whole(prompt, windows, self._prefill.passes))
        if last < layers:
            flops += 2.0 * self._kv_weights(last) * (prompt - 1)
        for layer in range(last, layers):
            keys = min(prompt, windows[layer] or prompt) - self._strict[layer]
            flops += 2.0 * self._weights(layer) + self.attention_flops(keys)
        return flops + self._voting_flops(prompt, windows) + self.head_flops()

    def decode_flops(self, context: int, prompt: int | None = None) -> float:
        beside = self._says("beside", default=0.0)
        reads = sum(self.reads(context, prompt)) + beside * self.config.layers
        body = self.linear_flops() + self.attention_flops(reads)
        own = self._says("step_flops", context, default=0.0)
        return (1 + beside) * body + own + self.head_flops()

    def kv_bytes(self, tokens: int, itemsize: int, prompt: int | None = None) -> int:
        rows = self.rows(tokens, prompt).values()
        known = self._says("slot_bytes", default=0.0) * self._row.kv_heads * sum(rows)
        logged = self._says("logged_bytes", tokens, itemsize, default=0.0)
        return round(self._held_bytes(rows, itemsize) + known + logged)

    def kv_bytes_read_per_token(
        self, context: int, itemsize: int, prompt: int | None = None
    ) -> float:
        return self._held_bytes(self.reads(context, prompt), itemsize)

    def first_target(self) -> int:
        return 1

    def _says(self, name: str, *sizes: int, default: float) -> float:
        """What a function that the eviction's cost module may have says."""
        says = _optional(self._eviction, name)
        return default if says is None else says(self.config, self.method, *sizes)

    def _held_bytes(self, rows: Iterable[float], itemsize: int) -> float:
        """Bytes of KV layers of so many rows each."""
        each = self.row_bytes(itemsize)
        return sum(each * held + self.extra_bytes(held, itemsize) for held in rows)

    def _fixed(self, rows: int) -> DecoderCost:
        """The same for sequences of so many, which shares are of."""
        return DecoderCost(self.config, fixed(self.method, rows), tables=self.tables)

    def _seen(self, layer: int, tokens: int, prompt: int | None) -> float:
        """Rows kept of so many: those in the layer's own window, where any are let go later."""
        kv, came = self.config.kv_of[layer], tokens if prompt is None else min(prompt, tokens)
        kept: float = self._eviction.rows(self.config, self.method, kv, tokens, came)
        return kept if self._grows else min(kept, self._windows[layer] or kept)

    def _voting_flops(self, prompt: int, windows: Windows) -> float:
        """FLOPs of attention scores that are worked out beside the fused attention, to be seen."""
        counts = _optional(self._eviction, "voters")
        voters = 0 if counts is None else counts(self.config, self.method, prompt)
        if not voters:
            return 0.0
        pairs = (causal_pairs(prompt, w) - causal_pairs(prompt - voters, w) for w in windows)
        return self.attention_flops(sum(pairs)) / 2

    def _prompt_windows(self) -> Windows:
        """The window through which each layer reads a prompt."""
        windows: list[int | None] = []
        for own, kv in zip(self._windows, self.config.kv_of, strict=True):
            window = self._eviction.prompt_window(self.config, self.method, kv)
            windows.append(min((w for w in (window, own) if w), default=None))
        return windows

    def _exit(self) -> int:
        """The first layer that only a prompt's last row goes through; past the top: none is."""
        layers, found, asked = self.config.layers, exit_layer(self.config), self._prefill.early_exit
        automatic = asked is None and (found == layers - 1 or self._observes_all)
        if found is None or asked is False or automatic:
            return layers
        if runs_by_row(self.config, self._prefill.passes):
            return layers
        return found

    def _kv_weights(self, layer: int) -> int:
        """Weights of the linear maps to keys and values."""
        c = self.config
        return 2 * c.width * c.kv_heads * c.head_dim if layer in self._owners else 0

    def _weights(self, layer: int) -> int:
        """Weights of a layer's linear maps: each is 2 FLOPs per row."""
        c = self.config
        own = c.width * (2 * c.heads * c.head_dim + c.ffn_width * (3 if c.gated else 2))
        return own + self._kv_weights(layer)

    def _whole(self, rows: int, windows: Windows, passes: int | None = None) -> Reading:
        """How a pass goes over sequences of so many rows."""
        by_row = runs_by_row(self.config, passes)
        return Reading(rows, windows, None if by_row else passes_of(self.config, rows, passes))

    def _forward(self, layers: range, reading: Reading) -> float:
        return sum(self._flops(layer, reading, reading.passes) for layer in layers)

    def _backward(self, layer: int, reading: Reading) -> float:
        """FLOPs of a layer's backward passes; one is two forward."""
        passes, sharing = reading.passes, self.config.sharing
        if passes is not None and sharing is not None:
            passes = min(passes, sharing.backward_passes)
        return 2.0 * self._flops(layer, reading, passes)

    def _flops(self, layer: int, reading: Reading, passes: int | None) -> float:
        """FLOPs of one layer over all rows, in the last so many passes where it is run in passes.

        In the first pass of all a layer finds no keys above it. Of the top of a cyclic segment all
        passes but the last want the keys and values alone.
        """
        linear, reads = self._weights(layer), 1
        if passes is not None and layer in self._tops:
            linear += self._kv_weights(layer) * (passes - 1)
        elif passes is not None and layer in self._cyclic:
            linear, reads = linear * passes, passes
            if passes == reading.passes and self.config.kv_of[layer] > layer:
                reads -= 1
        rows = reading.rows
        pairs = causal_pairs(rows, reading.windows[layer]) - rows * self._strict[layer]
        return 2.0 * rows * linear + self.attention_flops(reads * pairs)


def cost(config: DecoderConfig, method: Method) -> Cost:
    """Return the cost of a decoder over tokens."""
    return DecoderCost(method.acting(config), method)


def _module(choice: Choice) -> ModuleType:
    """The cost module of an axis value."""
    if choice.value.cost is None:
        raise ValueError(f"method '{choice.value.name}' has no cost module")
    return importlib.import_module(choice.value.cost)


def _optional(module: ModuleType, name: str) -> Callable[..., Any] | None:
    """A function that a cost module may have."""
    found: Callable[..., Any] | None = getattr(module, name, None)
    return found


def causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs (query, key) that a causal pass over so many tokens reads."""
    w = tokens if window is None else min(window, tokens)
    return w * (w + 1) // 2 + (tokens - w) * w
