"""kvlab's models in vLLM 0.32: found through the entry point `vllm.general_plugins`."""

from __future__ import annotations

ARCHITECTURE = "KvlabForCausalLM"
SUPPORTED = "0.32"


def register() -> None:
    """Tell vLLM of our architecture, config and cache layout; in each of its processes, twice too.

    A vLLM of another minor version is left alone: what we need of it is not promised there.
    """
    import vllm

    if not vllm.__version__.startswith(f"{SUPPORTED}."):
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from kvlab.platform.serving.vllm_0_32 import arena
    from kvlab.platform.serving.vllm_0_32.config import MODEL_TYPE, KvlabConfig, Settle

    AutoConfig.register(MODEL_TYPE, KvlabConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Settle
    arena.register()
