"""The paged layout in vLLM: its own attention kernels over its own blocks, one layer each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend
from vllm.v1.attention.selector import get_attn_backend

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.methods.cache.interface import Extra, Step
from kvlab.methods.cache.ragged import RaggedCache
from kvlab.methods.decoder.config import DecoderConfig


class PagedCache(RaggedCache):
    """Every row, or those of a window, in vLLM's blocks; layers may read others' (`kv_of`).

    Layers that read upward find, in the first pass of a prompt, the past alone, which is nothing.
    Queries and keys come unrotated: vLLM's own kernel turns them where they lie.
    """

    rotates = True

    def __init__(
        self,
        config: DecoderConfig,
        windows: tuple[int | None, ...],
        cache_config: CacheConfig,
        layers: nn.ModuleList,
        frequencies: Tensor,
        longest: int,
    ) -> None:
        """Args: windows: of each KV layer. layers: is given vLLM's. frequencies: of the rotation.

        longest: tokens of a request at most.
        """
        self._config = config
        self._turns = turns(frequencies, longest)
        strict = config.sharing is not None and config.sharing.strict
        of = dict(zip(config.kv_layers, windows, strict=True))
        self._layers: dict[int, Attention] = {}
        for layer, kv in sorted(enumerate(config.kv_of), key=lambda pair: pair[0] != pair[1]):
            own = kv == layer and layer in config.kv_layers
            window = of[kv]
            if config.windows is not None and config.windows[layer] is not None:
                window = min(w for w in (window, config.windows[layer]) if w is not None)
            self._layers[layer] = made = _attention(
                config, layer, None if own else kv, window, strict or kv > layer, cache_config
            )
            layers.append(made)
        self._upward = config.upward
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self._written: set[int] = set()

    def plan(self, step: Step) -> Extra | None:
        self._fresh.clear()
        self._written.clear()
        assert step.positions is not None
        self._places = step.positions[0]
        if self._turns.device != self._places.device:
            self._turns = self._turns.to(self._places.device)
        return None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._fresh[layer] = fresh = self._turned(k), _rows(v)
        self._written.add(layer)
        if self._upward:  # the next pass reads them, before this layer attends
            unified_kv_cache_update(*fresh, _name(layer))

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        kv = self._config.kv_of[layer]
        attention, queries = self._layers[layer], self._turned(q)
        out: Tensor
        if kv == layer:
            k, v = self._fresh.pop(layer)
            out = attention(queries, k, v)
        else:
            out = attention(queries, None, None)
        heads = out.view(1, len(queries), -1, q.shape[-1]).transpose(1, 2)
        if self._upward and kv > layer and kv not in self._written:
            heads = heads.clone()
            for rows in self.batch.prompts:
                heads[:, :, rows] = 0
        return heads

    def _turned(self, heads: Tensor) -> Tensor:
        """Rotate [1, H, T, D], in place where its rows lie so; return it as rows [T, H, D]."""
        rows = _rows(heads).flatten(1)  # a copy where a norm stands in front
        if self._turns.dtype != rows.dtype:
            self._turns = self._turns.to(rows.dtype)
        torch.ops._C.rotary_embedding(self._places, rows, None, heads.shape[-1], self._turns, True)
        return torch.unflatten(rows, 1, (-1, heads.shape[-1]))

    def nbytes(self) -> int:
        found = (layer.kv_cache.untyped_storage() for layer in self._layers.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def _attention(
    config: DecoderConfig,
    layer: int,
    source: int | None,
    window: int | None,
    strict: bool,
    cache_config: CacheConfig,
) -> Attention:
    """vLLM's attention of a layer that keeps rows (source None) or reads another's."""
    base = get_attn_backend(config.head_dim, torch.get_default_dtype(), cache_config.cache_dtype)
    if not base.supports_head_size(config.head_dim):
        sizes = ", ".join(map(str, base.get_supported_head_sizes()))
        raise KvlabError(
            f"vLLM's attention on this device takes heads of {sizes}; the model has "
            f"{config.head_dim}"
        )
    given: dict[str, Any] = {"attn_backend": _strict(base)} if strict else {}
    made = Attention(
        config.heads,
        config.head_dim,
        config.head_dim**-0.5,
        num_kv_heads=config.kv_heads,
        cache_config=cache_config,
        per_layer_sliding_window=window - 1 if strict and window is not None else window,
        prefix=_name(layer),
        **given,
    )
    if source is not None:  # set afterwards: the constructor admits layers below alone
        made.kv_sharing_target_layer_name = _name(source)
        made.impl.kv_sharing_target_layer_name = _name(source)
    return made


def turns(frequencies: Tensor, positions: int) -> Tensor:
    """The cosines and sines [positions, rotary_dim] of each place, as vLLM's kernel takes them.

    Args: frequencies: [rotary_dim], the latter half those of the sines (`signed_frequencies`).
    """
    half = len(frequencies) // 2
    angles = torch.arange(positions, device="cpu").unsqueeze(-1) * frequencies[half:].cpu()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _name(layer: int) -> str:
    return f"model.layers.{layer}.attention"


def _rows(heads: Tensor) -> Tensor:
    """From [1, H, T, D] to vLLM's [T, H, D]; its kernels take rows with gaps between them."""
    return heads[0].transpose(0, 1)


@lru_cache(maxsize=8)
def _strict(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend whose queries do not read their own token: keys end one earlier."""

    class StrictBuilder(base.get_builder_cls()):  # type: ignore[misc]
        def build(self, common_prefix_len: int, step: Any, fast_build: bool = False) -> Any:
            bound = step.seq_lens_cpu_upper_bound
            shorter = step.replace(
                seq_lens=(step.seq_lens - 1).clamp_min(0),
                seq_lens_cpu_upper_bound=None if bound is None else (bound - 1).clamp_min(0),
                max_seq_len=max(1, step.max_seq_len - 1),
            )
            found = super().build(common_prefix_len, shorter, fast_build)
            rows = step.query_start_loc[1:] - step.query_start_loc[:-1]
            alone = (rows > 0) & (step.seq_lens == rows)
            found.keyless = step.query_start_loc[:-1][alone].long()
            return found

    class StrictImpl(base.get_impl_cls()):  # type: ignore[misc]
        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, step: Any,
            output: Tensor, *args: Any, **named: Any,
        ) -> Tensor:  # fmt: skip
            out: Tensor = super().forward(
                layer, query, key, value, kv_cache, step, output, *args, **named
            )
            if step is not None:  # rows without a key come back as whatever lay there
                output[step.keyless] = 0
            return out

    made: type[AttentionBackend] = subclass_attention_backend("Strict", base, StrictBuilder)
    made.get_impl_cls = staticmethod(lambda: StrictImpl)
    return made


def prompts_of(name: str) -> tuple[slice, ...]:
    """The rows of the prompts that begin in this step."""
    step = get_forward_context().attn_metadata[name]
    starts, lengths = step.query_start_loc.cpu(), step.seq_lens.cpu()
    rows = starts[1:] - starts[:-1]
    new = ((rows > 0) & (rows == lengths)).nonzero()[:, 0].tolist()
    return tuple(slice(int(starts[i]), int(starts[i + 1])) for i in new)
