"""Evictions by age as a rule for one parallel pass: what a live cache would have kept."""

from __future__ import annotations

from dataclasses import replace

from kvlab.kernels.attention import Rule
from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import Amount


class ReadsWindow:
    """Reads the newest rows and the sinks alone.

    Args:
        window: rows that a query may read, its own included, sinks apart.
        sinks: of the first rows, which it always may; 0 for a model with windows of its own.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        self.window, self.sinks = window, sinks

    def rule(self, layer: int, own: Rule) -> Rule:
        """The tighter of this and the model's own rule."""
        if own.window is not None and own.window <= self.window:
            return own
        return replace(own, window=self.window, sinks=self.sinks)


def window_of(method: Method) -> int | None:
    """Past rows that all layers keep, whatever the prompt; None where they differ or depend."""
    choice = method["budget"]
    if choice.value.default and isinstance(choice.params, Amount):
        return choice.params.tokens
    return None
