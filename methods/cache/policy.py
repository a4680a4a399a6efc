"""The interface of an eviction policy: which past tokens a cache keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from kvlab.kernels.attention import Rule


class Policy(ABC):
    """Decides what each layer of one cache keeps.

    One instance serves one cache, from the prompt to the last token.
    """

    def __init__(self, params: Any) -> None:
        self.params = params

    @abstractmethod
    def capacity(self, layer: int, tokens: int) -> int:
        """Rows that KV layer `layer` holds at most in a sequence of `tokens` tokens."""

    def rule(self, layer: int, own: Rule) -> Rule:
        """What a query of decoder layer `layer` may read; `own` is the model's rule."""
        return own
