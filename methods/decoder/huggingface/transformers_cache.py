"""Our caches as a transformers `Cache`: any method of the run-time axes inside `generate()`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from kvlab.kernels.attention import CAUSAL, EMPTY, Rule, attend
from kvlab.methods.axis import Method
from kvlab.methods.cache.interface import Cache, Step
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.decoder.huggingface import transformers_decoder
from kvlab.methods.decoder.huggingface.transformers_decoder import Host, HostError, host, rotate
from kvlab.methods.decoder.huggingface.transformers_method import method_of, refuse_short

ATTENTION = "kvlab"
"""The name of our attention in transformers' `AttentionInterface`."""


def kv_cache(
    model: nn.Module,
    apply: str | Mapping[str, Any] | Method = "full_attention",
    *,
    budget: float | int | None = None,
    new_tokens: int = 512,
) -> KVCache:
    """Return a cache for `model.generate(..., past_key_values=...)` and for `model(...)`.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3 or GPT-NeoX of the transformers library.
        apply: run-time axes as a YAML's `apply:` has them: "h2o", or {"h2o": {}, "kivi": {}}.
        budget: rows that each layer keeps on average: a float is a share of the prompt, an int a
            number of tokens. None: as `apply` says.
        new_tokens: rows that may come after the first prompt, later turns included; those of a
            cache that keeps everything are allocated at once.

    Returns:
        An instance of transformers' `Cache` too. It acts only in the passes that it is given to:
        the model is as it was in all others.

    Raises:
        KvlabError: a model or a method that does not go with it, in one line.
    """
    import transformers

    transformers.AttentionInterface.register(ATTENTION, _attention)
    parts = host(model)
    return _kind()(parts, method_of(apply, budget, parts.sizes), new_tokens)  # type: ignore[no-any-return]


@cache
def _kind() -> type[Any]:
    """`KVCache` as a subclass of transformers' own, which is imported no sooner."""
    from transformers import Cache as TransformersCache

    return type("KVCache", (KVCache, TransformersCache), {"__doc__": KVCache.__doc__})


class KVCache:
    """One batch of sequences, from the prompt to the last turn.

    Hooks on the model show it a pass from its beginning to its end; for the length of the pass the
    model attends by `_attention`, to what this cache holds and by the positions it gives.
    """

    def __init__(self, parts: Host, method: Method, new_tokens: int) -> None:
        # What transformers' Cache asks of itself; its layers are not ours.
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.method = method
        self._host, self._new_tokens = parts, new_tokens
        self._cache: Cache | None = None
        self._seen = 0
        self._next: Tensor | None = None
        self._pass: _Pass | None = None
        self._before: Tensor | None = None
        self._mass: Tensor | None = None
        self._own: str | None = None
        windows = parts.sizes.windows or (None,) * parts.sizes.layers
        self._rules = [CAUSAL if window is None else Rule(window=window) for window in windows]
        handles = [
            parts.body.register_forward_pre_hook(_weak(self._begin), with_kwargs=True),
            parts.body.register_forward_hook(_weak(self._end), with_kwargs=True, always_call=True),
            parts.body.rotary_emb.register_forward_hook(  # type: ignore[union-attr]
                _weak(self._unturn), with_kwargs=True
            ),
            *(x.register_forward_pre_hook(_weak(self._enter)) for x in parts.layers),
            *(x.register_forward_hook(_weak(self._leave)) for x in parts.attentions),
        ]
        self._close = weakref.finalize(self, _remove, handles)

    def close(self) -> None:
        """Take the hooks off the model; done by itself once nobody holds the cache."""
        self._close()
        self._cache = None

    def nbytes(self) -> int:
        """Bytes of the live storages, tables included; 0 before the first pass."""
        return 0 if self._cache is None else self._cache.nbytes()

    def reserve(self, rows: int) -> None:
        """Say how many rows a turn will bring, its answer included; see StreamingLLM's `turns`."""
        if self._cache is not None:
            self._cache.reserve(rows)

    def reset(self) -> None:
        """Forget everything; the next pass is a prompt."""
        self._cache = self._next = None
        self._seen = 0

    # What transformers asks of a cache.

    def __repr__(self) -> str:
        return f"KVCache({self.method.label}, {self._seen} rows seen, {self.nbytes()} bytes)"

    def __len__(self) -> int:
        return self._host.sizes.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows seen so far, padding and those that left included."""
        return self._seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No length at which it is full for transformers."""
        return -1

    @property
    def is_initialized(self) -> bool:
        return self._cache is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's keys and values [B, H_kv, T, D] of a pass; return them as they are."""
        if self._pass is None:
            raise HostError("this cache was made for another model: kv_cache(model, ...)")
        self._pass.cache.write(layer_idx, key_states, value_states, self._pass.positions)
        return key_states, value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise HostError(
            "beam search moves sequences about in a batch, which this cache cannot follow: "
            "generate with num_beams=1"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take rows back."""
        raise HostError(
            "assisted generation takes tokens back, which a cache that let rows go cannot: "
            "generate without an assistant"
        )

    activate_past_recording = crop

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse to change the batch."""
        raise HostError("this cache serves one batch from its prompt on: make one for each batch")

    batch_repeat_interleave = batch_select_indices

    # A pass, in the order of its calls.

    def _begin(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("past_key_values") is not self:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        rows = kwargs["inputs_embeds"] if ids is None else ids
        if torch.is_grad_enabled():
            raise HostError("this cache keeps no gradients: call the model under torch.no_grad()")
        if kwargs.get("output_attentions"):
            raise HostError("output_attentions: this cache's attention returns no weights")
        batch, count = rows.shape[:2]
        positions = self._positions(rows, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if self._next is not None and len(self._next) != batch:
            self.batch_select_indices(self._next)
        if self._cache is None:
            self._cache = self._open(batch, count)
        elif count > 1 and positions is not None:
            self._cache.reserve((positions != EMPTY).sum(1))
        with _lasting():
            extra = self._cache.plan(Step(count, ids, positions))
        if extra is not None:
            raise HostError(f"'{self.method.label}' adds rows to a pass, which a model cannot take")
        self._pass = _Pass(self._cache, self._host, positions, rows)
        kwargs = kwargs | {
            "attention_mask": None,
            "position_ids": self._pass.places.clamp(min=0),
            "kvlab_cache": self,
        }
        self._own = self._host.config._attn_implementation
        self._host.config._attn_implementation = ATTENTION
        return args, kwargs

    def _unturn(
        self, module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        if self._pass is None or not self._pass.cache.rotates:
            return None
        return transformers_decoder.unturned(output)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._pass is not None:
            self._before = args[0]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend with queries [B, H, T, D] of a layer; return [B, T, H, D_v]."""
        assert self._pass is not None
        out, self._mass = self._pass.attend(layer, q, self._rules[layer])
        return out.transpose(1, 2)

    def _leave(self, attention: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        if self._pass is None or self._before is None:
            return
        after = self._before + output[0]
        self._pass.cache.observe(attention.layer_idx, self._before, after, self._mass)
        self._before = self._mass = None

    def _end(self, body: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        done, self._pass = self._pass, None
        if done is None:
            return
        self._host.config._attn_implementation = self._own
        self._before = self._mass = None
        if output is not None:  # None: the pass broke off
            with _lasting():
                done.cache.finish()
            self._seen += done.rows
            self._next = (done.places[:, -1:] + 1).expand(done.batch, 1)

    def _open(self, batch: int, prompt: int) -> Cache:
        refuse_short(self.method, prompt)
        table = self._host.embedding
        with _lasting():
            return open_cache(
                self._host.sizes, self.method, batch=batch, tokens=prompt + self._new_tokens,
                device=table.device, dtype=table.dtype,
            )  # fmt: skip

    def _positions(self, rows: Tensor, mask: Tensor | None, given: Tensor | None) -> Tensor | None:
        """The positions [B, T] of a pass's rows, EMPTY on padding; None for a prompt without any.

        A pass of one row asks the device nothing.
        """
        batch, count = rows.shape[:2]
        first = self._next
        if first is not None and count == 1:
            return first
        new = None if mask is None else self._new(mask, batch, count)
        if new is None:
            packed = torch.arange(count, device=rows.device).expand(batch, count)
            positions = packed if first is None else packed + first
        else:
            positions = new.long().cumsum(1) - 1 + (0 if first is None else first)
            positions = positions.masked_fill(~new, EMPTY)
        if given is not None and not bool(((given == positions) | (positions == EMPTY)).all()):
            raise HostError("position_ids: must count the rows of each sequence: leave them out")
        return None if first is None and new is None else positions

    def _new(self, mask: Tensor, batch: int, count: int) -> Tensor | None:
        """Which rows [B, T] of a pass are real; None: all."""
        wanted = [batch, self._seen + count]
        if list(mask.shape) != wanted:
            raise HostError(
                f"attention_mask: must be {wanted}, one entry for each row since the prompt, found "
                f"{list(mask.shape)}"
            )
        real = mask.bool()
        if not bool(real[:, -1].all()):
            raise HostError("attention_mask: pad on the left (tokenizer.padding_side = 'left')")
        if self._next is not None and bool(
            (real[:, : self._seen].sum(1, keepdim=True) != self._next).any()
        ):
            raise HostError("attention_mask: hides rows that the cache has read already")
        new = real[:, self._seen :]
        return None if bool(new.all()) else new


class _Pass:
    """One forward pass of the model over the cache.

    Attributes:
        positions: [B, T], None where they are packed; places: the same, never None.
    """

    def __init__(self, cache: Cache, parts: Host, positions: Tensor | None, given: Tensor) -> None:
        """Args: given: [B, T] ids or [B, T, W] embeddings."""
        self.cache, self.positions, self._host = cache, positions, parts
        self.batch, self.rows = given.shape[:2]
        packed = positions is None
        if positions is None:
            positions = torch.arange(self.rows, device=given.device).unsqueeze(0)
        self.places = positions
        self._packed = self.places if packed else None
        self._masks: dict[tuple[int, Rule], tuple[Tensor, Tensor]] = {}
        self._turns: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def attend(self, layer: int, q: Tensor, own: Rule) -> tuple[Tensor, Tensor | None]:
        """Attend with a layer's queries to what the cache holds for it."""
        keys = self.cache.read(layer)
        assert keys is not None
        k, v, k_positions, stored = keys
        if self.cache.rotates:
            (k, v), stored = keys.rows(q.dtype), None
            for_queries, for_keys = self.cache.rotary_positions(layer, self.places)
            q, k = self._turned(q, for_queries), self._turned(k, for_keys)
        rule = self.cache.rule(layer, own)
        return attend(
            q, k, v, self.positions, k_positions, rule,
            mass_rows=self.cache.key_mass_rows(layer),
            mask=partial(self._mask, rule, k_positions), stored=stored,
        )  # fmt: skip

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        known = self._turns.get(id(positions))
        if known is None:
            known = self._turns[id(positions)] = positions, self._host.turns(x, positions)
        return rotate(x, *known[1])

    def _mask(self, rule: Rule, k_positions: Tensor | None) -> Tensor | None:
        """The mask of these keys, made once for all layers whose keys have the same positions."""
        keys = self._packed if k_positions is None else k_positions
        if keys is None:
            return None
        known = self._masks.get((id(keys), rule))
        if known is None:
            known = self._masks[id(keys), rule] = keys, rule.allows(self.places, keys)
        return known[1]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kvlab_cache: KVCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls as attention for the length of a pass over a `KVCache`."""
    return kvlab_cache.attend(module.layer_idx, query), None


@contextmanager
def _lasting() -> Iterator[None]:
    """What is made in here may be written to in later passes, in inference mode or out of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _weak(method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does not keep its cache alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else alive(*args)

    return hook


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
