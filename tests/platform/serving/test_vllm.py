"""vLLM's real engine over kvlab's models: the torch engine's tokens, and the pool as predicted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlab import KvlabError
from kvlab.methods.decoder.config import gpt_neox
from kvlab.methods.registry import resolve
from kvlab.methods.store import load
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.serving import export
from kvlab.platform.serving.demand import Demand, demand_of

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvlab.platform.serving.vllm_0_32.engine import Asked, Engine

TOKENS, POOL, NEW = 256, 24 << 20, 12
LENGTHS = (23, 9, 40, 1, 64, 31, 17, 5)
SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "full_tied": ({}, {}),
    "sharing": ({"cla": {}}, {}),
    "full_qk_norm": ({}, {}),
    "full_neox": ({}, {}),
    "sharing_upward": ({"lckv": {}}, {}),
    "sharing_upward_window": ({"lckv": {}}, {"sliding_window": {"window": 16}}),
    "window": ({}, {"sliding_window": {"window": 16}}),
    "streaming_llm": ({}, {"streaming_llm": {}, "uniform": {"tokens": 12}}),
    "h2o": ({}, {"h2o": {}, "uniform": {"tokens": 12}}),
    "snapkv": ({}, {"snapkv": {"window": 4}, "uniform": {"tokens": 12}}),
    "squeeze": ({}, {"h2o": {}, "squeeze_attention": {"tokens": 16}}),
    "block": ({"block_transformer": {}}, {}),
    "block_h2o": ({"block_transformer": {}}, {"h2o": {}, "uniform": {"tokens": 4}}),
    "adore": ({}, {"adore": {"controller": "", "rebuild": 4}, "uniform": {"tokens": 12}}),
    "adore_rule": (
        {"cla": {}},
        {"adore": {"scores": "rule", "rebuild": 4}, "squeeze_attention": {"tokens": 12}},
    ),
    "sharing_snapkv": ({"cla": {}}, {"snapkv": {"window": 4}, "uniform": {"tokens": 12}}),
}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(1, 257, (length,), generator=draw).tolist() for length in LENGTHS]


def alone(source: Path, apply: dict[str, Any], asked: list[list[int]]) -> list[tuple[int, ...]]:
    """What kvlab's own engine generates for each prompt by itself."""
    model = load(source).eval()
    found = []
    for prompt in asked:
        session = model.start(torch.tensor([prompt]), new_tokens=NEW, apply=resolve(apply))
        tokens = [int(session.logits.argmax())]
        for _ in range(NEW - 1):
            tokens.append(int(session.step(torch.tensor(tokens[-1:])).argmax()))
        found.append(tuple(tokens))
    return found


@contextmanager
def engine(
    source: Path, apply: dict[str, Any], folder: Path, *, pool: int = POOL, **options: Any
) -> Iterator[tuple[Engine, Demand]]:
    export.write(source, resolve(apply).to_dict(), folder)
    options.setdefault("dtype", "float32")
    asked = Asked(folder, pool=pool, tokens=TOKENS, requests=3, options=options)
    with Engine(asked) as running:
        found = running.effective()
        demand = demand_of(
            read_config(source), trained_method(source), resolve(apply).to_dict(), itemsize=4,
            block_size=found["block_size"][0], in_flight=found["max_num_batched_tokens"],
        )  # fmt: skip
        running.check(demand)
        yield running, demand


@pytest.mark.parametrize("name", SERVED)
def test_it_says_what_the_torch_engine_says(
    served: Callable[..., Path], controller: Path, name: str, tmp_path: Path
) -> None:
    """Eight requests of all lengths, three at a time: they join and leave as others run."""
    method, apply = SERVED[name]
    if name == "adore":
        apply = {**apply, "adore": {**apply["adore"], "controller": str(controller)}}
    sizes = {
        "full_tied": {"tie_embeddings": True},
        "full_qk_norm": {"qk_norm": True},
        "full_neox": gpt_neox(128, 4, 4),
    }
    source, asked = served(method, **sizes.get(name, {})), prompts()
    with engine(source, apply, tmp_path / "out") as (running, demand):
        found = running.generate(asked, NEW)
        effective, capacity = running.effective(), running.capacity()
    assert [one.ids for one in found] == alone(source, apply, asked)
    assert effective["model"] == "KvlabForCausalLM"
    assert effective["pool_bytes"] == pytest.approx(POOL, rel=0.02)
    # What was predicted from sizes alone is what vLLM gives its requests.
    assert effective["pool_bytes"] // effective["blocks"] == demand.block_bytes
    most = effective["blocks"] / demand.most_blocks(TOKENS)
    assert capacity["requests"] == pytest.approx(most, rel=0.05)


def test_the_other_model_runner_says_the_same(served: Callable[..., Path], tmp_path: Path) -> None:
    """V2 is vLLM's own choice on a GPU; here in a process of its own, its kernels interpreted."""
    names, asked, wanted = ("full", "sharing_upward", "squeeze", "block_h2o"), prompts(), []
    for name in names:
        method, apply = SERVED[name]
        export.write(served(method), resolve(apply).to_dict(), tmp_path / name)
        wanted.append({"runner": "V2", "ids": list(map(list, alone(served(method), apply, asked)))})
    engine = {"pool": POOL, "tokens": TOKENS, "requests": 3, "options": {"dtype": "float32"}}
    folders = [str(tmp_path / name) for name in names]
    task = {"folders": folders, "engine": engine, "prompts": asked, "new": NEW}
    script = Path(__file__).with_name("runner_v2.py")
    ran = subprocess.run(
        [sys.executable, script, json.dumps(task)], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line) for line in ran.stdout.splitlines()] == wanted


@pytest.mark.parametrize(
    ("name", "pool"), [("h2o", 1 << 17), ("block", 1 << 19), ("snapkv", 1 << 20)]
)
def test_a_full_pool_makes_requests_wait_and_turns_none_out(
    served: Callable[..., Path], name: str, pool: int, tmp_path: Path
) -> None:
    method, apply = SERVED[name]
    source, asked = served(method), prompts()
    options = {"pool": pool, "max_num_seqs": 64}
    with engine(source, apply, tmp_path / "out", **options) as (running, demand):
        each = [demand.blocks(len(prompt), len(prompt) + NEW) for prompt in asked]
        assert 4 * sum(each) > running.effective()["blocks"]
        found = running.generate(4 * asked, NEW)
    assert [one.ids for one in found] == 4 * alone(source, apply, asked)
    assert not any(one.preemptions for one in found)


@pytest.mark.parametrize("name", ["full", "sharing"])
@pytest.mark.parametrize("prefixes", [False, True])
def test_pages_are_given_in_chunks_shared_and_taken_back(
    served: Callable[..., Path], name: str, prefixes: bool, tmp_path: Path
) -> None:
    """Prompts in parts of 16 tokens, prefixes shared or not, a pool for hardly two requests."""
    method, apply = SERVED[name]
    source, asked = served(method), prompts()
    asked += [asked[4] + [7, 8, 9], asked[4][:50]]
    options = {
        "max_num_batched_tokens": 16, "enable_prefix_caching": prefixes, "block_size": 32,
        "num_gpu_blocks_override": 10, "max_num_seqs": 6,
    }  # fmt: skip
    with engine(source, apply, tmp_path / "out", **options) as (running, _):
        assert running.effective()["chunked_prefill"]
        found = running.generate(asked, NEW)
    assert [one.ids for one in found] == alone(source, apply, asked)


def test_prompts_are_whole_whatever_else_cuts_them(
    served: Callable[..., Path], tmp_path: Path
) -> None:
    method, apply = SERVED["h2o"]
    options = {"long_prefill_token_threshold": 16}
    with engine(served(method), apply, tmp_path / "out", **options) as (running, _):
        found = running.generate(prompts(), NEW)
    assert [one.ids for one in found] == alone(served(method), apply, prompts())


def test_bfloat16(served: Callable[..., Path], tmp_path: Path) -> None:
    """Rounding decides near ties differently; most tokens are the same."""
    apply, source = SERVED["h2o"][1], served({})
    with engine(source, apply, tmp_path / "out", dtype="bfloat16") as (running, _):
        found = running.generate(prompts(), NEW)
    pairs = zip(found, alone(source, apply, prompts()), strict=True)
    same = sum(a == b for one, wanted in pairs for a, b in zip(one.ids, wanted, strict=True))
    assert same > 0.8 * NEW * len(LENGTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: rows that a ranking keeps"),
        ({"tensor_parallel_size": 2}, "one device each"),
        ({"max_model_len": 4096}, "max_model_len"),
    ],
    ids=str,
)
def test_refused(
    served: Callable[..., Path], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    export.write(served({}), resolve(SERVED["h2o"][1]).to_dict(), tmp_path / "out")
    with pytest.raises(KvlabError, match=message):
        Engine(Asked(tmp_path / "out", pool=POOL, options={"dtype": "float32", **options}))
