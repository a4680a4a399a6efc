"""The decoder as a language model over tokens: scoring in one pass, generation over a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab import KvlabError
from kvlab.kernels.attention import EMPTY
from kvlab.methods.axis import Method
from kvlab.methods.cache.opening import one_pass_cache, open_cache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.model import Decoder
from kvlab.methods.decoder.segments import runs_by_row
from kvlab.methods.model import (
    LanguageModel,
    Score,
    Session,
    refuse_padding_behind,
    refuse_unequal_turns,
)
from kvlab.methods.prefill.params import prefill_of
from kvlab.methods.sharing.convert import merge_of, start_layers
from kvlab.methods.weights import fill, without_weights

if TYPE_CHECKING:
    from kvlab.methods.cache.ragged import RaggedCache


class TokenModel(LanguageModel):
    """Token granularity: one position of the decoder is one token."""

    def __init__(self, config: DecoderConfig, method: Method) -> None:
        super().__init__()
        self.config = config
        self.method = method
        self.decoder = Decoder(method.acting(config))

    @classmethod
    def convert(cls, parent: LanguageModel, method: Method) -> LanguageModel:
        if not isinstance(parent, TokenModel):
            raise KvlabError(f"a {type(parent).__name__} cannot be converted back to tokens")
        model = without_weights(lambda: cls(parent.config, method))
        config, layers = model.decoder.config, "decoder.layers."
        started = start_layers(config, parent.decoder, range(config.layers), merge_of(method))
        tensors = {
            name: tensor.clone()
            for name, tensor in parent.state_dict().items()
            if not name.startswith(layers)
        }
        tensors |= {layers + name: tensor for name, tensor in started.tensors.items()}
        fill(model, tensors, "the parent")
        model.fresh = frozenset(layers + name for name in started.merged)
        return model

    def forward(
        self, ids: Tensor, valid: Tensor | None = None, apply: Method | None = None
    ) -> Score:
        hidden = self.decoder.body(
            self.decoder.embed(ids),
            positions_of(valid),
            one_pass_cache(self.decoder.config, apply),
            ids,
            passes=prefill_of(apply).passes,
        )
        nll = F.pad(self.decoder.nll(hidden[:, :-1], ids[:, 1:]), (1, 0))
        scored = scored_of(ids, valid)
        return Score(nll if valid is None else nll.masked_fill(~scored, 0.0), scored)

    def predictions(self, ids: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.decoder.body(self.decoder.embed(ids), positions_of(valid), ids=ids)
        return F.pad(self.decoder.head(hidden[:, :-1]), (0, 0, 1, 0)), scored_of(ids, valid)

    def start(
        self,
        ids: Tensor,
        valid: Tensor | None = None,
        *,
        new_tokens: int,
        apply: Method | None = None,
    ) -> Session:
        return TokenSession(self.decoder, ids, valid, new_tokens, apply)

    def serve(
        self, ids: Tensor, positions: Tensor, cache: RaggedCache, passes: int | None = None
    ) -> Tensor:
        hidden = self.decoder.embed(ids.unsqueeze(0))
        body = self.decoder.body(
            hidden, positions.unsqueeze(0), cache, ids.unsqueeze(0), passes=passes
        )
        return body[0]

    def head_of(self, hidden: Tensor) -> Tensor:
        return self.decoder.head(hidden)

    @property
    def rotation(self) -> Tensor:
        return self.decoder.frequencies

    @property
    def acting(self) -> DecoderConfig:
        return self.decoder.config

    def checkpoint_gradients(self, on: bool) -> None:
        self.decoder.checkpoint_gradients(on)

    def body_parameters(self) -> int:
        return self.decoder.body_parameters()

    def describe(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "method": self.method.to_dict()}


class TokenSession(Session):
    """A batch of sequences over one cache."""

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        ids: Tensor,
        valid: Tensor | None,
        new_tokens: int,
        apply: Method | None,
    ) -> None:
        refuse_padding_behind(valid)
        batch, rows = ids.shape
        self._decoder = decoder
        hidden = decoder.embed(ids)
        self._cache = open_cache(
            decoder.config,
            apply,
            batch=batch,
            tokens=rows + new_tokens,
            device=hidden.device,
            dtype=hidden.dtype,
        )
        self._prompt = torch.tensor(batch * rows) if valid is None else valid.sum()
        self._steps = 0
        positions = positions_of(valid)
        if positions is None:
            self._next = torch.full((batch, 1), rows, device=ids.device)
        else:
            self._next = positions[:, -1:] + 1
        prefill = prefill_of(apply)
        hidden = decoder.body(
            hidden,
            positions,
            self._cache,
            ids,
            passes=prefill.passes,
            exit_early=decoder.exits_early(prefill.early_exit, self._cache),
        )
        self.logits = decoder.head(hidden[:, -1])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        ids = tokens.unsqueeze(1)
        hidden = self._decoder.body(self._decoder.embed(ids), self._next, self._cache, ids)
        self._next += 1
        self._steps += 1
        self.logits = self._decoder.head(hidden[:, -1])
        return self.logits

    @torch.inference_mode()
    def extend(self, ids: Tensor, valid: Tensor | None = None, *, new_tokens: int = 0) -> Tensor:
        refuse_padding_behind(valid)
        if runs_by_row(self._decoder.config):
            refuse_unequal_turns(valid)
        batch, rows = ids.shape
        if valid is None:
            positions = self._next + torch.arange(rows, device=ids.device)
            given: int | Tensor = batch * rows
            each: int | Tensor = rows
        else:
            counted = positions_of(valid)
            assert counted is not None
            positions = torch.where(valid, counted + self._next, counted)
            each = valid.sum(1)
            given = each.sum()
        self._cache.reserve(each + new_tokens)
        hidden = self._decoder.body(self._decoder.embed(ids), positions, self._cache, ids)
        self._next = positions[:, -1:] + 1
        self._prompt = self._prompt + given
        self.logits = self._decoder.head(hidden[:, -1])
        return self.logits

    def freeze(self) -> bool:
        return self._cache.freeze()

    def thaw(self) -> None:
        self._cache.thaw()

    def advance(self) -> None:
        self._cache.advance(1)
        self._steps += 1

    def parts(self) -> list[object]:
        return [self, *self._cache.parts()]

    def kv_bytes(self) -> int:
        return self._cache.nbytes()

    def kv_tokens(self) -> int:
        return int(self._prompt) + self._steps * len(self._next)


def scored_of(ids: Tensor, valid: Tensor | None) -> Tensor:
    """Mark the tokens [B, T] that follow another of their sequence."""
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    if valid is not None:
        scored[:, 1:] = valid[:, 1:] & valid[:, :-1]
    return scored


def positions_of(valid: Tensor | None) -> Tensor | None:
    """Positions [B, T] that count each sample's valid rows from 0, EMPTY on padding."""
    if valid is None:
        return None
    return (valid.long().cumsum(1) - 1).masked_fill(~valid, EMPTY)
