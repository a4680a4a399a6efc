"""The one decoder: embeddings, layers over a cache, head. Every method is built around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlab import KvlabError
from kvlab.kernels.likelihood import linear_nll
from kvlab.methods.cache.ephemeral import one_pass
from kvlab.methods.cache.interface import Cache, Step
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.layers import Layer, Pass, norm
from kvlab.methods.decoder.rope import signed_frequencies
from kvlab.methods.decoder.segments import Segment, exit_layer, passes_of, runs_by_row, segments


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
        self._segments, self._exit = segments(config), exit_layer(config)
        self.norm = norm(config)
        own_head = head and not (config.tie_embeddings and embeddings)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False) if own_head else None
        # Not a buffer: `model.to(bfloat16)` must not round the frequencies.
        self.frequencies = signed_frequencies(config)
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
        *,
        passes: int | None = None,
        exit_early: bool = False,
    ) -> Tensor:
        """Run the layers and the final norm.

        Args:
            hidden: [B, T, W] embeddings.
            positions: [B, T] int64, EMPTY on padding. None: rows 0..T-1 without padding.
            cache: the past; None reads and keeps nothing (training, scoring).
            ids: [B, T] what `hidden` embeds, for a cache that wants to see tokens.
            passes: over layers that read keys from above them; None: as the model trains.
            exit_early: leave out of the upper layers all rows but the last (see `exit_layer`). A
                decoder that runs row by row leaves none out.

        Returns:
            [B, T, W], after the final norm; rows of padding hold nothing meaningful. [B, 1, W]
            where rows were left out.
        """
        cache = one_pass(self.config, passes=passes) if cache is None else cache
        rows = hidden.shape[1]
        if rows > 1 and runs_by_row(self.config, passes):
            return self._row_by_row(hidden, positions, cache, ids)
        extra = cache.plan(Step(rows, ids, positions, hidden))
        if extra is not None:
            positions = self._places(hidden, positions)
            hidden = torch.cat((hidden, self.embed(extra.ids)), dim=1)
            positions = torch.cat((positions, extra.positions), dim=1)
            exit_early = False  # the last row is not the caller's
        step = self._pass(hidden, positions, cache)
        layers = list(self.layers)  # a ModuleList takes its time to find one by number
        for segment in self._segments:
            if segment.cyclic:
                hidden = self._cycle(segment, hidden, step, passes)
                continue
            for i in range(segment.start, segment.stop):
                if exit_early and i == self._exit:
                    hidden = layers[i](hidden, step, "last")
                    step = step.last_row(hidden)
                else:
                    hidden = layers[i](hidden, step)
        cache.finish()
        normed: Tensor = self.norm(hidden if extra is None else hidden[:, :rows])
        return normed

    def _cycle(self, segment: Segment, hidden: Tensor, step: Pass, passes: int | None) -> Tensor:
        """Run layers that read upward, pass after pass, each from the same rows.

        In a pass they read the keys of the pass before; the first finds the past alone. Only the
        last `backward_passes` have a gradient. Of the topmost layer, passes before the last want
        the keys and values alone.
        """
        *below, top = range(segment.start, segment.stop)
        sharing = self.config.sharing
        assert sharing is not None
        count = passes_of(self.config, hidden.shape[1], passes)
        learns = torch.is_grad_enabled()
        out = hidden
        for number in range(count):
            step.final = number == count - 1
            left = count - number
            if learns and left == sharing.backward_passes:
                torch.clear_autocast_cache()  # it holds weights that were cast without gradient
            with torch.set_grad_enabled(learns and left <= sharing.backward_passes):
                out = hidden
                for i in below:
                    out = self.layers[i](out, step)
                out = self.layers[top](out, step, "all" if step.final else "none")
        return out

    def _row_by_row(
        self, hidden: Tensor, positions: Tensor | None, cache: Cache, ids: Tensor | None
    ) -> Tensor:
        """Run one row after another: each finds all before it in the cache."""
        positions = self._places(hidden, positions)
        rows = [
            self.body(
                hidden[:, i : i + 1],
                positions[:, i : i + 1],
                cache,
                None if ids is None else ids[:, i : i + 1],
            )
            for i in range(hidden.shape[1])
        ]
        return torch.cat(rows, dim=1)

    def _places(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            return positions
        return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])

    def exits_early(self, wanted: bool | None, cache: Cache) -> bool:
        """Whether `body` may leave rows of a prompt out of the upper layers.

        Args:
            wanted: None decides: where it leaves out whole layers.

        Raises:
            KvlabError: it is wanted and cannot be.
        """
        if wanted is False or (wanted is None and cache.observes_all):
            return False
        if wanted is None:
            return self._exit is not None and self._exit < self.config.layers - 1
        if self._exit is None:
            raise KvlabError("early_exit: the last KV layer is run in passes, which need all rows")
        if cache.observes_all:
            raise KvlabError("early_exit: the cache decides by every row of every layer")
        return True

    def _pass(self, hidden: Tensor, positions: Tensor | None, cache: Cache) -> Pass:
        if self.frequencies.device != hidden.device:
            self.frequencies = self.frequencies.to(hidden.device)
        return Pass(positions, self.frequencies, hidden, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., W] to logits [..., V]."""
        if self.output is not None and type(self.output) is not nn.Linear:
            return torch.as_tensor(self.output(hidden))  # what stands in its place
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

    def checkpoint_gradients(self, on: bool) -> None:
        """Recompute layers in the backward pass, or keep what it needs."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.checkpointing = on

    def body_parameters(self) -> int:
        """Parameters of the layers and the final norm."""
        parts = (self.layers, self.norm)
        return sum(p.numel() for part in parts for p in part.parameters())
