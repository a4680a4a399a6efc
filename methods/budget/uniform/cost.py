"""What budgets keep whose mean over the layers is the amount: uniform ones, and all that divide."""

from __future__ import annotations

from kvlab.methods.axis import Method
from kvlab.methods.budget.amount import least_rows
from kvlab.methods.decoder.config import DecoderConfig


def rows(config: DecoderConfig, method: Method, layer: int, prompt: int) -> float:
    """The amount, as the mean over the layers."""
    amount: int = method["budget"].params.rows(prompt)
    return max(amount, least_rows(method))
