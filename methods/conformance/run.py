"""A batch of sequences over one cache, driven as a session drives it, with all of it in sight."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.methods.axis import Method
from kvlab.methods.cache.interface import Cache
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.language_model import positions_of
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.prefill.params import prefill_of


class Run:
    """Reads prompts, turns and single tokens; returns the logits of every row.

    Args:
        tokens: rows of a sequence at most, padding included.
        cache: None: the one that the method opens.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        batch: int,
        tokens: int,
        cache: Cache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.decoder, self._prefill = decoder, prefill_of(method)
        weight = next(decoder.parameters())
        with torch.no_grad():
            self.cache = cache or open_cache(
                decoder.config, method, batch=batch, tokens=tokens,
                device=device or weight.device, dtype=weight.dtype,
            )  # fmt: skip
        self.next: Tensor | None = None

    @torch.no_grad()
    def read(self, ids: Tensor, valid: Tensor | None = None, new_tokens: int = 0) -> Tensor:
        """Read a prompt or a turn [B, T], left-padded; return the logits [B, T, V].

        Args: new_tokens: that will be generated after it.
        """
        batch, rows = ids.shape
        positions = positions_of(valid)
        passes = self._prefill.passes if self.next is None else None
        if self.next is not None:
            each = rows if valid is None else valid.sum(1)
            self.cache.reserve(each + new_tokens)
            if positions is None:
                positions = self.next + torch.arange(rows, device=ids.device)
            else:
                positions = torch.where(positions >= 0, positions + self.next, positions)
        logits = self._logits(ids, positions, passes)
        if positions is None:
            self.next = torch.full((batch, 1), rows, device=ids.device)
        else:
            self.next = positions[:, -1:] + 1
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [B]; return the next logits [B, V]."""
        assert self.next is not None
        logits = self._logits(tokens.unsqueeze(1), self.next, None)
        self.next = self.next + 1
        return logits[:, -1]

    def steps(self, ids: Tensor) -> Tensor:
        """Append tokens [B, T] one by one; return the logits [B, T, V]."""
        return torch.stack([self.step(column) for column in ids.unbind(1)], dim=1)

    def _logits(self, ids: Tensor, positions: Tensor | None, passes: int | None) -> Tensor:
        decoder = self.decoder
        hidden = decoder.body(decoder.embed(ids), positions, self.cache, ids, passes=passes)
        return decoder.head(hidden)
