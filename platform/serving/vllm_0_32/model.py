"""The model class that vLLM runs: one of kvlab's, over a cache that lies in vLLM's pool."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from kvlab import KvlabError
from kvlab.kernels.attention import Rule
from kvlab.methods.build import build
from kvlab.methods.cache.ragged import Batch, RaggedCache
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.prefill.params import prefill_of
from kvlab.methods.registry import from_dict
from kvlab.platform.serving.demand import Paged, Slots, under
from kvlab.platform.serving.vllm_0_32.arena import Arena
from kvlab.platform.serving.vllm_0_32.config import demand, described
from kvlab.platform.serving.vllm_0_32.linear import pack
from kvlab.platform.serving.vllm_0_32.paged import PagedCache, prompts_of


class KvlabForCausalLM(nn.Module):
    """Rows of a step come flat, [T]; the decoder runs them as one sequence whose cache knows whose
    they are.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        found = described(vllm_config)
        config = DecoderConfig.from_dict(dict(found["config"]))
        self.model = build(config, from_dict(found["method"]))
        self.demand = demand(vllm_config)
        self.method = under(found["method"], found["apply"])
        self.longest = int(vllm_config.model_config.max_model_len)
        self.requests = int(vllm_config.scheduler_config.max_num_seqs)
        self.passes = prefill_of(from_dict(found["apply"])).passes
        self.attention = nn.ModuleList()
        self.arena: Arena | None = None
        self._cache: RaggedCache | None = None
        if isinstance(self.demand, Slots):
            dtype = torch.get_default_dtype()
            self.arena = Arena(self.demand, dtype, self.longest)
        elif isinstance(self.demand, Paged):
            self._cache = PagedCache(
                self.model.acting,
                self.demand.windows,
                vllm_config.cache_config,
                self.attention,
                self.model.rotation,
                self.longest,
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Unused: rows come as tokens."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> Tensor:
        """Return the hidden states [T, W] of a step's rows [T]."""
        step = get_forward_context().attn_metadata
        if step is None:
            return self._idle(input_ids, positions)
        cache = self._ready()
        if self.arena is not None:
            cache.begin(step[self.arena.layer_name])
        elif self.model.acting.upward:  # asks the device
            cache.begin(_paged_batch(input_ids, next(iter(step))))
        return self.model.serve(input_ids, positions, cache, self._passes(cache))

    def _passes(self, cache: RaggedCache) -> int | None:
        """Passes over layers that read upward: at most the rows of the step's longest prompt.

        One row at a time takes one, whatever others do.
        """
        sharing = self.model.acting.sharing
        if sharing is None or not self.model.acting.upward:
            return self.passes
        longest = max((rows.stop - rows.start for rows in cache.batch.prompts), default=1)
        asked = self.passes or sharing.forward_passes + sharing.backward_passes
        return min(asked, longest)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states [N, W] to logits [N, V]."""
        return self.model.head_of(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the tensors of a kvlab model, whose names are its own; then pack them.

        Raises:
            KvlabError: the folder lacks some.
        """
        missing = dict(self.model.state_dict())
        for name, tensor in weights:
            missing.pop(name).copy_(tensor)
        if missing:
            raise KvlabError(f"the weights lack {', '.join(sorted(missing))}")
        pack(self.model)
        return {name for name, _ in self.named_parameters()}

    def _ready(self) -> RaggedCache:
        """The cache, once vLLM has made its pool."""
        if self._cache is None:
            assert self.arena is not None
            pool = self.arena.pool
            assert pool is not None
            found = self.arena.demand
            eviction = self.method["eviction"]
            slots = eviction.value.load()(eviction.params).in_slots()
            self._cache = slots.ranking.pooled()(
                found.config, self.method, slots, pool, found.space(), self.model.rotation
            )
        return self._cache

    def _idle(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run rows without a past, as vLLM does to see how much memory a step takes.

        Where prompts are kept until they were cut, so are their keys and values here; and beside
        them what a step of as many requests as may run takes of its own.
        """
        cache = _Idle()
        if isinstance(self.demand, Slots):
            numbers = self.requests * self.demand.gathered(self.longest)
            cache.beside = torch.empty(numbers, dtype=torch.get_default_dtype(), device=ids.device)
        nothing = torch.empty(0, 1, dtype=torch.long, device=ids.device)
        rows = torch.empty(0, dtype=torch.long, device=ids.device)
        cache.begin(Batch((slice(0, len(ids)),), rows, rows, nothing, nothing, len(ids)))
        return self.model.serve(ids, positions, cache, self.passes)


class _Idle(RaggedCache):
    """Attends to nothing and keeps what it is given, which is what a prompt takes at most.

    Attributes: beside: memory that is held meanwhile.
    """

    beside: Tensor | None = None

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None) -> None:
        self._held[layer] = k, v

    def attend(self, layer: int, q: Tensor, own: Rule) -> Tensor:
        return torch.zeros_like(q)

    def nbytes(self) -> int:
        return 0

    def keep(self, which: Tensor | None, state: Tensor) -> None: ...

    def start(self, prompts: list[int], state: Tensor) -> None: ...

    def measure(self, prompts: list[int], tokens: list[int]) -> None: ...


def _paged_batch(ids: Tensor, layer: str) -> Batch:
    nothing = torch.empty(0, 1, dtype=torch.long, device=ids.device)
    none = nothing[:, 0]
    return Batch(prompts_of(layer), none, none, nothing, nothing, 0)
