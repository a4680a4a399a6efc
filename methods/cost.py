"""What a method costs, predicted from sizes alone: parameters, FLOPs, KV bytes. Pure Python.

A FLOP is one addition or one multiplication: a matrix product of [m, k] and [k, n] is 2 m k n. Only
matrix products count (linear layers, head, attention scores and values); look-ups, norms, softmax
and rotations do not. Attention counts the key rows a query may read, not the masked ones. A
backward pass is two forward passes; layers run in passes (`Sharing`) have one for each pass with a
gradient.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod

from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig


class Cost(ABC):
    """The predicted cost of one model under one method; bytes and FLOPs of ONE sequence.

    A value of the granularity axis supplies a subclass: its cost module has `cost(config, method)`.
    A value of the eviction axis has in its cost module `rows(config, method, layer, tokens,
    prompt)`, the rows that a KV layer keeps of a sequence of so many tokens, of which so many came
    as a prompt, under the method's eviction and budget, which is also what a decode step reads; and
    `prompt_window(config, method, layer)`, the window through which a prompt is read, or None. It
    may have `in_one_pass(config, method)`, whether a parallel pass scores as the live cache would
    (else: no); `heads(config, method)`, heads that keep rows (else the KV heads); `slot_bytes(
    config, method)`, what a cache knows of a head's row, in bytes, where heads differ (else 0); and
    `voters(config, method, prompt)`, prompt queries whose attention is worked out a second time
    (else none); `logged_bytes(config, method, tokens, itemsize)`, what a sequence of so many tokens
    has beside its rows, `beside(config, method)`, rows that go through all layers beside that of a
    decode step, and `step_flops(config, method, context)`, FLOPs of such a step outside the layers
    (else none). For budgets see `kvlab.methods.budget.cost`. A value of the precision axis has
    `row_bytes(config, method, itemsize)`, the bytes of a row of one KV layer, keys and values; it
    may have `extra_bytes(config, method, rows, itemsize)`, those of a layer of so many rows beside
    theirs (else none).

    Wherever `prompt` may be given, it is the tokens that came at once in the beginning, which
    budgets are shares of; None: all of them.
    """

    @abstractmethod
    def body_parameters(self) -> int:
        """Parameters outside the vocabulary tables (embeddings and head)."""

    @abstractmethod
    def total_parameters(self) -> int:
        """All parameters; a tied table counts once."""

    @abstractmethod
    def train_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of a training step per token of its sequences, backward pass included.

        What gradient checkpointing computes a second time is left out.
        """

    @abstractmethod
    def score_flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of scoring sequences of so many tokens, per token.

        In one go, or token by token where what stays depends on content; `score_steps` says which.
        Budgets are then shares of the whole sequence.
        """

    @abstractmethod
    def score_steps(self, sequence_length: int) -> int:
        """Passes that scoring a sequence takes, one after another: one, where one says it all."""

    @abstractmethod
    def prefill_flops(self, prompt: int) -> float:
        """FLOPs from a prompt of so many tokens to the first logits."""

    @abstractmethod
    def decode_flops(self, context: int, prompt: int | None = None) -> float:
        """FLOPs of generating one token that reads a context of so many, its own included."""

    @abstractmethod
    def kv_bytes(self, tokens: int, itemsize: int, prompt: int | None = None) -> int:
        """Bytes of keys and values kept for a sequence of so many tokens.

        Where heads keep rows of their own, what says which rows they are is part of it.
        """

    def kv_bytes_per_token(self, context: int, itemsize: int, prompt: int | None = None) -> float:
        """Bytes kept per token of a sequence of so many."""
        return self.kv_bytes(context, itemsize, prompt) / context

    @abstractmethod
    def kv_bytes_read_per_token(
        self, context: int, itemsize: int, prompt: int | None = None
    ) -> float:
        """Bytes of keys and values that generating one token at this context reads."""

    @abstractmethod
    def first_target(self) -> int:
        """The first position of a sequence that the model predicts."""


def cost_of(config: DecoderConfig, method: Method) -> Cost:
    """Return the predicted cost of a decoder of these sizes under a method."""
    value = method["granularity"].value
    if value.cost is None:
        raise ValueError(f"method '{value.name}' has no cost module")
    cost: Cost = importlib.import_module(value.cost).cost(config, method)
    return cost
