"""The slots layout in vLLM: one group of blocks, given whole to a request when it is admitted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvlab import KvlabError
from kvlab.methods.cache.ragged import Batch
from kvlab.platform.serving.demand import Slots


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(AttentionSpec):
    """Attributes:
    demand: what requests take.
    longest: tokens of a request at most.
    """

    demand: Slots
    longest: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.demand.most_blocks(self.longest) * self.demand.block_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Runner V1 looks every token's block up all the same, and uses it for nothing.
        most = max(self.demand.most_blocks(max_len), -(-max_len // self.demand.block_size))
        return 1 + most

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class ArenaManager(SingleTypeKVCacheManager):
    """Gives a request all blocks that it will ever need, as the first of its tokens come.

    Before them in its table stands how many tokens it will have at most: the worker cannot know.
    """

    kv_cache_spec: ArenaSpec

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._expected: dict[str, tuple[int, int]] = {}

    def expect(self, request: Request) -> None:
        """Hear how long a request can get."""
        spec, prompt = self.kv_cache_spec, request.num_prompt_tokens
        self._expected[request.request_id] = (
            prompt,
            min(prompt + request.max_tokens, spec.longest),
        )

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **named: Any
    ) -> int:
        if self.req_to_blocks.get(request_id):
            return 0
        return self.kv_cache_spec.demand.blocks(*self._sizes(request_id, num_tokens))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        prompt, end = self._sizes(request_id, num_tokens)
        given = self.block_pool.get_new_blocks(self.kv_cache_spec.demand.blocks(prompt, end))
        found = [KVCacheBlock(end, is_null=True), *given]
        held.extend(found)
        return found

    def free(self, request_id: str) -> None:
        super().free(request_id)
        self._expected.pop(request_id, None)

    def _sizes(self, request_id: str, tokens: int) -> tuple[int, int]:
        """Tokens of a request's prompt, and at its end."""
        return self._expected.get(request_id, (tokens, self.kv_cache_spec.longest))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    def cache_blocks(self, *args: Any, **named: Any) -> None:
        """No prefix is shared."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **_: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0


class ArenaScheduler(Scheduler):
    """Tells the manager how long a request can get before it is admitted."""

    def add_request(self, request: Request) -> None:
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, ArenaManager):
                manager.expect(request)
        super().add_request(request)


class ArenaBuilder(AttentionMetadataBuilder[Batch]):
    """Turns vLLM's step into a `Batch`. The host knows all that decides its shapes."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        step = common_attn_metadata
        count = step.num_reqs
        starts = step.query_start_loc_cpu[: count + 1]
        lengths = step.seq_lens_cpu_upper_bound
        lengths = (step.seq_lens.cpu() if lengths is None else lengths)[:count]
        rows = starts[1:] - starts[:-1]
        new = (rows > 0) & (rows == lengths)
        going = (rows == 1) & ~new
        if bool(((rows > 0) & ~new & ~going).any()):
            raise KvlabError("a prompt came in parts: kvlab's cache needs it whole")
        table = step.block_table_tensor[:count].long()
        ends, blocks = table[:, 0], table[:, 1:]
        first = new.nonzero()[:, 0]
        spans = zip(starts[first].tolist(), starts[first + 1].tolist(), strict=True)
        device = blocks.device
        return Batch(
            tuple(slice(begun, ended) for begun, ended in spans),
            starts[:-1][going].long().to(device, non_blocking=True),
            ends[first.to(device)],
            blocks[first.to(device)],
            blocks[going.nonzero()[:, 0].to(device)],
            int(step.max_seq_len),
        )


class ArenaImpl(AttentionImpl[Batch]):
    """Never called: the model's own cache attends."""

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def forward(self, *args: Any, **named: Any) -> Tensor:
        raise NotImplementedError


class ArenaBackend(AttentionBackend):
    """What vLLM asks of a layer's backend."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # noqa: RUF012
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ArenaImpl]:
        return ArenaImpl

    @staticmethod
    def get_builder_cls() -> type[ArenaBuilder]:
        return ArenaBuilder


class Arena(nn.Module, AttentionLayerBase):
    """The one layer that vLLM sees of a model whose rows lie in slots.

    Attributes:
        pool: [blocks * block_size, width], once vLLM has made it.
    """

    kv_sharing_target_layer_name = None

    def __init__(self, demand: Slots, dtype: torch.dtype, longest: int) -> None:
        super().__init__()
        self.demand, self.dtype, self.longest = demand, dtype, longest
        self.layer_name = "model.layers.0.arena"
        self.kv_cache = torch.tensor([])
        self.impl = ArenaImpl()
        get_current_vllm_config().compilation_config.static_forward_context[self.layer_name] = self

    @property
    def pool(self) -> Tensor | None:
        if not self.kv_cache.numel():
            return None
        return self.kv_cache.view(-1, self.demand.width)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ArenaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        demand = self.demand
        return ArenaSpec(
            block_size=demand.block_size,
            num_kv_heads=1,
            head_size=demand.width,
            dtype=self.dtype,
            state_content_bytes=demand.width * demand.itemsize,
            demand=demand,
            longest=self.longest,
        )


@lru_cache(maxsize=1)
def register() -> None:
    """Let vLLM's planner know the layout; its own first, or they never are."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, uniform_type_base_spec=ArenaSpec)
