"""What a served folder's pool holds, in words: vLLM's blocks, and the method's own bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.platform.serving.demand import demand_of, under
from kvlab.platform.serving.export import described_in

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def lines(folder: Path, pool: Mapping[str, int], tokens: int | None, dtype: str) -> Iterator[str]:
    """Say how many requests fit, beside how many the full cache of the same model would let in.

    Args:
        pool: blocks, and their size, as the engine has them. tokens: of a request at most.
    """
    if len(pool) < 2 or dtype not in ITEMSIZES:
        return
    raw: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    described = described_in(raw["kvlab"], folder)
    config = DecoderConfig.from_dict(dict(described["config"]))
    longest, itemsize = tokens or config.max_positions, ITEMSIZES[dtype]
    prompt = longest // 2
    given: dict[str, Any] = {
        "itemsize": itemsize, "block_size": pool["block_size"], "in_flight": longest,
    }  # fmt: skip
    demand = demand_of(config, described["method"], described["apply"], **given)
    held = pool["blocks"] * demand.block_bytes
    full = demand_of(config, {}, {}, **given)
    yield (
        f"{held / 2**20:,.0f} MiB in {pool['blocks']:,} blocks: "
        f"{demand.requests(held, prompt, longest):,} requests of {prompt} + {longest - prompt} "
        f"tokens, {full.requests(held, prompt, longest):,} with the full cache"
    )
    own = cost_of(config, under(described["method"], described["apply"]))
    yield (
        f"each takes {demand.blocks(prompt, longest) * demand.block_bytes:,} bytes of it, for "
        f"{own.kv_bytes(longest, itemsize, prompt):,} that the method keeps"
    )
