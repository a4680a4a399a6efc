"""The one decoder: embeddings, layers over a cache, head. Every method is built around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.kernels.likelihood import linear_nll
from kvlab.methods.cache.ephemeral import EphemeralCache
from kvlab.methods.cache.interface import Cache, Step
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.layers import Layer, Pass, norm
from kvlab.methods.decoder.rope import signed_frequencies


class Decoder(nn.Module):
    """A causal transformer of the Llama, Mistral, Qwen or GPT-NeoX family.

    Args:
        config: sizes and choices.
        embeddings, head: whether it has the vocabulary tables; a decoder over block embeddings has
            none. With `config.tie_embeddings` the head is the embedding table.
    """

    def __init__(
        self, config: DecoderConfig, *, embeddings: bool = True, head: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width) if embeddings else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = norm(config)
        own_head = head and not (config.tie_embeddings and embeddings)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False) if own_head else None
        # Not a buffer: `model.to(bfloat16)` must not round the frequencies.
        self._frequencies = signed_frequencies(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up token ids [B, T]; return the residual stream [B, T, W]."""
        if self.embedding is None:
            raise KvlabError("this decoder has no embedding table: it runs over embeddings")
        embedded: Tensor = self.embedding(ids)
        return embedded

    def body(
        self,
        hidden: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Run the layers and the final norm.

        Args:
            hidden: [B, T, W] embeddings.
            positions: [B, T] int64, EMPTY on padding. None: rows 0..T-1 without padding.
            cache: the past; None reads and keeps nothing (training, scoring).
            ids: [B, T] what `hidden` embeds, for a cache that wants to see tokens.

        Returns:
            [B, T, W], after the final norm; rows of padding hold nothing meaningful.
        """
        cache = EphemeralCache() if cache is None else cache
        rows = hidden.shape[1]
        extra = cache.plan(Step(rows, ids, positions))
        if extra is not None:
            if positions is None:
                positions = torch.arange(rows, device=hidden.device).expand(len(hidden), rows)
            hidden = torch.cat((hidden, self.embed(extra.ids)), dim=1)
            positions = torch.cat((positions, extra.positions), dim=1)
        step = self._pass(hidden, positions, cache)
        for layer in self.layers:
            hidden = layer(hidden, step)
        cache.finish()
        normed: Tensor = self.norm(hidden if extra is None else hidden[:, :rows])
        return normed

    def _pass(self, hidden: Tensor, positions: Tensor | None, cache: Cache) -> Pass:
        if self._frequencies.device != hidden.device:
            self._frequencies = self._frequencies.to(hidden.device)
        return Pass(positions, self._frequencies, hidden, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., W] to logits [..., V]."""
        return F.linear(hidden, self._head_table())

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the log probability of targets [B, T] given hidden [B, T, W]: [B, T] float32."""
        return linear_nll(hidden.flatten(0, 1), self._head_table(), targets.flatten()).view_as(
            targets
        )

    def _head_table(self) -> Tensor:
        table = self.output if self.output is not None else self.embedding
        if table is None:
            raise KvlabError("this decoder has no head: it runs over embeddings")
        return table.weight

    def body_parameters(self) -> int:
        """Parameters of the layers and the final norm."""
        parts = (self.layers, self.norm)
        return sum(p.numel() for part in parts for p in part.parameters())
