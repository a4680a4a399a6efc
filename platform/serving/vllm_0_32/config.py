"""What a served folder's config.json says, and what vLLM's settings must be for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from kvlab import KvlabError
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.serving.demand import SLOTS_OF_A_BLOCK, Demand, Slots, demand_of
from kvlab.platform.serving.export import described_in

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODEL_TYPE = "kvlab"


class KvlabConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Attributes: kvlab: {"config", "method", "apply"}, as `kvlab export` writes them."""

    model_type = MODEL_TYPE

    def __init__(self, kvlab: Mapping[str, Any] | None = None, **rest: Any) -> None:
        self.kvlab = dict(kvlab or {})
        super().__init__(**rest)


def described(vllm_config: VllmConfig) -> dict[str, Any]:
    """What the folder that an engine runs says of its model."""
    model = vllm_config.model_config
    return described_in(model.hf_config.kvlab, Path(model.model))


def demand(vllm_config: VllmConfig) -> Demand:
    """What the model of an engine takes of its pool.

    Raises:
        Unserved: it cannot be served.
    """
    import torch

    found = described(vllm_config)
    config = DecoderConfig.from_dict(dict(found["config"]))
    return demand_of(
        config,
        found["method"],
        found["apply"],
        itemsize=torch.empty(0, dtype=vllm_config.model_config.dtype).element_size(),
        block_size=SLOTS_OF_A_BLOCK,
        in_flight=vllm_config.scheduler_config.max_num_batched_tokens,
    )


class Settle:
    """vLLM's hook for an architecture (`VerifyAndUpdateConfig`): refuses, then sets what must be.

    A ranking decides over a whole prompt, so prompts are never cut; what it leaves belongs to one
    request, so no prefix is shared.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises: KvlabError: in one line, what cannot go together."""
        found = demand(vllm_config)
        if problems := list(refused(vllm_config, found)):
            raise KvlabError("; ".join(problems))
        vllm_config.model_config.enforce_eager = True
        if not isinstance(found, Slots) and not _upward(vllm_config):
            return
        scheduler = vllm_config.scheduler_config
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0  # it cuts prompts too
        longest = vllm_config.model_config.max_model_len
        at_once = scheduler.max_num_seqs * (1 + found.beside if isinstance(found, Slots) else 1)
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest, at_once)
        vllm_config.cache_config.enable_prefix_caching = False
        if isinstance(found, Slots):
            scheduler.scheduler_cls = f"{__package__}.arena.ArenaScheduler"
            scheduler.async_scheduling = False

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to do: the model's own description is whole."""


def refused(vllm_config: VllmConfig, found: Demand) -> list[str]:
    """Say which of vLLM's features cannot go with what is served."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    said = []
    if parallel.world_size > 1:
        said.append(
            "kvlab's models are served by one device each: leave tensor and pipeline parallelism "
            "out, and use --data-parallel-size for more"
        )
    if vllm_config.speculative_config is not None:
        said.append("speculative decoding cannot be used with kvlab's models")
    if vllm_config.kv_transfer_config is not None:
        said.append("KV connectors cannot be used with kvlab's models")
    if vllm_config.lora_config is not None:
        said.append("LoRA cannot be used with kvlab's models: merge it (`uptrain: {lora: ...}`)")
    if isinstance(found, Slots) and cache.cache_dtype not in ("auto", None):
        said.append(
            f"--kv-cache-dtype {cache.cache_dtype}: rows that a ranking keeps are stored in the "
            "model's own type: leave it out"
        )
    return said


def _upward(vllm_config: VllmConfig) -> bool:
    """Whether layers read keys from above them: a prompt is then run in passes, as a whole."""
    from kvlab.methods.registry import from_dict

    found = described(vllm_config)
    config = DecoderConfig.from_dict(dict(found["config"]))
    return from_dict(found["method"]).acting(config).upward
