"""A model's folder as an engine in this process, for as long as it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kvlab.methods.axis import Method
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.serving import export
from kvlab.platform.serving.demand import PAGES, Demand, demand_of

if TYPE_CHECKING:
    import torch

    from kvlab.platform.serving.vllm_0_32.engine import Engine

SPARE = 1.1
"""How much larger than the full caches of so many requests a pool is, where none is asked for."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Attributes:
    engine: started, and found to run what was meant. effective: what it runs with.
    demand: what its requests take.
    pool: bytes that were asked for.
    """

    engine: Engine
    effective: dict[str, Any]
    demand: Demand
    pool: int


@contextmanager
def opened(
    source: Path,
    apply: Method,
    dtype: torch.dtype,
    *,
    longest: int,
    requests: int,
    seed: int,
    pool: int | None = None,
) -> Iterator[Opened]:
    """Start an engine over a model's folder under run-time choices.

    Prompts that come again are not found in a cache: what is measured is the same for all methods.

    Args:
        longest: tokens of a request at most. requests: at once at most.
        pool: bytes; None: what so many requests take with the full cache, and a tenth.

    Raises:
        KvlabError: it cannot be served, or vLLM does not run what was meant.
    """
    from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine

    config, canonical = read_config(source), apply.to_dict()
    itemsize = dtype.itemsize
    if pool is None:
        full = demand_of(
            config, {}, {}, itemsize=itemsize, block_size=PAGES["cpu"], in_flight=longest
        )
        pool = int(SPARE * (requests * full.blocks(1, longest) + 1) * full.block_bytes)
    with TemporaryDirectory(prefix="kvlab-served-") as scratch:
        folder = Path(scratch) / "model"
        export.write(source, canonical, folder)
        options = {"dtype": str(dtype).removeprefix("torch."), "enable_prefix_caching": False}
        with Engine(Asked(folder, pool, longest, requests, seed, options)) as engine:
            effective = engine.effective()
            demand = demand_of(
                config,
                trained_method(source),
                canonical,
                itemsize=itemsize,
                block_size=effective["block_size"][0],
                in_flight=effective["max_num_batched_tokens"],
            )
            engine.check(demand)
            yield Opened(engine, effective, demand, pool)
