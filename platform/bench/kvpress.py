"""Requests over a cut prompt beside kvpress: one checkpoint, the same prompts, threads and dtype.

kvpress and the transformers it wants live in an environment of their own (`make bench` sets it up);
a worker process there answers one request at a time, in turn with ours. Every press runs at the
faster of its two public ways, found before the pairs: transformers' `generate` under the press, and
the steps of kvpress's pipeline, which takes one text at a time, here for whole batches. Attention
is "sdpa", "eager" where a press reads its weights; the cache is transformers' DynamicCache.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlab import KvlabError
from kvlab.methods.axis import Method
from kvlab.methods.decoder.config import DecoderConfig, llama
from kvlab.methods.model import LanguageModel
from kvlab.methods.registry import resolve
from kvlab.methods.store import load
from kvlab.platform.bench import training
from kvlab.platform.bench.line import Line, middle, not_slower
from kvlab.platform.jobs.benchmark.measure import generate
from kvlab.platform.jobs.benchmark.median import summarise

PYTHON = Path(__file__).resolve().parents[2] / ".venv-kvpress/bin/python"
WORKER = Path(__file__).with_name("kvpress_worker.py").resolve()

VOCABULARY = 4096
SIZES = llama(512, 8, 8, 2, 1408, max_positions=2048)
SPREAD = 0.05
"""Of the random weights: wide enough that what is attended to decides the next token."""
PROMPTS = (512, 1024)
BATCHES = (1, 4)
GENERATE = 64
REPEATS = 7
WINDOW = 64
"""Of SnapKV: kvpress's default."""
AIM = 3.0
WAYS = ("generate", "steps")


class WorkerError(KvlabError):
    """kvpress's side cannot be set up or did not answer."""


@dataclass(frozen=True)
class Pair:
    """A press, and the method of ours that keeps the same rows.

    Attributes:
        ratio: share of the prompt that the press removes. settings: the press's others.
        ours: the eviction. budget: and how it is divided; empty: uniformly.
    """

    name: str
    press: str | None
    ratio: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)

    def applied(self, prompt: int) -> Method:
        """Our method, with the budget of kvpress: kept rows rounded down."""
        if self.press is None:
            return resolve({})
        tokens = int(prompt * (1 - self.ratio))
        (name,) = self.budget or {"uniform"}
        return resolve({**self.ours, name: {**self.budget.get(name, {}), "tokens": tokens}})

    def request(self) -> dict[str, Any]:
        settings = {"compression_ratio": self.ratio, **self.settings} if self.press else {}
        return {"press": self.press, "settings": settings}


SNAPKV = {"snapkv": {"window": WINDOW, "kernel": 5}}
PAIRS = (
    Pair("full cache", None),
    Pair(
        "StreamingLLM, 20 % kept",
        "StreamingLLMPress",
        0.8,
        {"n_sink": 4},
        {"streaming_llm": {"sinks": 4, "positions": "absolute", "generated": "keep"}},
    ),
    Pair(
        "SnapKV, 20 % kept",
        "SnapKVPress",
        0.8,
        {"window_size": WINDOW, "kernel_size": 5},
        SNAPKV,
    ),
    Pair(
        "observed attention, 20 % kept",
        "ObservedAttentionPress",
        0.8,
        {},
        {"observed_attention": {}},
    ),
    # Half: with less of so short a prompt kvpress falls back to equal budgets.
    Pair(
        "PyramidKV, 50 % kept",
        "PyramidKVPress",
        0.5,
        {"window_size": WINDOW, "kernel_size": 5, "beta": 20},
        SNAPKV,
        {"pyramidkv": {"rule": "kvpress", "beta": 20}},
    ),
)


def run() -> list[Line]:
    """Time whole requests (prefill, cut, decode), every pair at every prompt and batch."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        write(checkpoint)
        with Theirs(checkpoint, torch.get_num_threads()) as theirs:
            ours = load(checkpoint).eval()
            for pair in PAIRS:
                for batch in BATCHES:
                    way = fastest(pair, batch, theirs)
                    lines += [compare(pair, p, batch, ours, theirs, way) for p in PROMPTS]
    ratios = [line.ratio for line in lines if line.ratio is not None]
    if ratios:
        lines.append(overall(ratios))
    return lines


def overall(ratios: Sequence[float]) -> Line:
    """The geometric mean of all ratios: stated, not a target."""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Line(
        f"geometric mean of the {len(ratios)} ratios beside kvpress (aim: {AIM:g})",
        "x",
        mean,
        detail={"ratios": list(ratios)},
    )


def write(folder: Path) -> None:
    """Write a checkpoint of random weights, as transformers does."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model = training.llama(DecoderConfig(vocab_size=VOCABULARY, **SIZES))
    for weights in model.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=SPREAD)
    model.save_pretrained(folder)


class Theirs:
    """The worker process of kvpress's environment.

    Raises:
        WorkerError: the environment is missing, or the worker says why it cannot answer.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        if not PYTHON.exists():
            raise WorkerError(f"kvpress: no {PYTHON}: `make bench` sets it up")
        # -I: neither this package's folder nor the caller's variables are on its path.
        self._process = subprocess.Popen(
            [str(PYTHON), "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.versions = self._ask({"checkpoint": str(checkpoint), "threads": threads})
        except WorkerError:
            self.close()
            raise

    def once(self, pair: Pair, prompts: list[list[int]], way: str) -> dict[str, Any]:
        """Generate once; return seconds of both parts, tokens, and rows kept in each layer."""
        request = {"prompts": prompts, "generate": GENERATE, "way": way}
        return self._ask({**pair.request(), **request})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise WorkerError(f"kvpress: the worker is gone ({error})") from error
        if not line:
            raise WorkerError(f"kvpress: the worker ended (exit {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"kvpress: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Theirs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prompts_of(prompt: int, batch: int) -> Tensor:
    """Random prompts [batch, prompt], the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(prompt + batch)
    return torch.randint(VOCABULARY, (batch, prompt), generator=generator)


def fastest(pair: Pair, batch: int, theirs: Theirs) -> str:
    """Their faster way, at the shortest prompt; the first of two trials warms up."""
    written = prompts_of(PROMPTS[0], batch).tolist()
    trials = {way: [whole(theirs.once(pair, written, way)) for _ in "12"] for way in WAYS}
    return min(trials, key=lambda way: min(trials[way]))


def compare(
    pair: Pair, prompt: int, batch: int, ours: LanguageModel, theirs: Theirs, way: str
) -> Line:
    """Alternate our requests and theirs; the line is that of whole requests."""
    prompts = prompts_of(prompt, batch)
    applied, written = pair.applied(prompt), prompts.tolist()

    def mine() -> dict[str, Any]:
        made = generate(ours, prompts, GENERATE, applied)
        return {"prefill": made.first_token, "decode": made.decode, "tokens": made.ids.tolist()}

    warm = mine(), theirs.once(pair, written, way)
    pairs = [(mine(), theirs.once(pair, written, way)) for _ in range(REPEATS)]
    seconds, other = ([whole(side[i]) for side in pairs] for i in (0, 1))
    return Line(
        f"request of {batch} x {prompt} + {GENERATE}: {pair.name}",
        "s",
        middle(seconds),
        middle(other),
        beside=f"kvpress, {way}",
        better="less",
        least_ratio=not_slower(seconds, other),
        void=unequal(warm[0]["tokens"], warm[1]["tokens"]),
        detail={
            "paired_ratio": summarise([b / a for a, b in zip(seconds, other, strict=True)]),
            "prefill_ratio": parts(pairs, "prefill"),
            "decode_ratio": parts(pairs, "decode"),
            "ours": [side[0] | {"tokens": None} for side in pairs],
            "theirs": [side[1] | {"tokens": None} for side in pairs],
            "way": way,
            "applied": applied.to_dict(),
            "press": pair.request(),
            "rows_kept": warm[1]["rows"],
            "versions": theirs.versions,
        },
    )


def whole(request: dict[str, Any]) -> float:
    return float(request["prefill"] + request["decode"])


def parts(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], part: str) -> dict[str, Any]:
    """How many times as long theirs took for one part, pair by pair."""
    return summarise([other[part] / mine[part] for mine, other in pairs])


def unequal(mine: list[list[int]], other: list[list[int]]) -> str:
    """Why the two did not do the same work; empty if every token is equal."""
    apart = sum(a != b for a, b in zip(mine, other, strict=True))
    return f"{apart} of {len(mine)} continuations differ" if apart else ""
