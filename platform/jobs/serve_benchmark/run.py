"""The serve_benchmark job: vLLM's server, loaded by a client that is measured first."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvlab.methods.registry import from_dict
from kvlab.platform.jobs import environment
from kvlab.platform.jobs.benchmark import load as machine
from kvlab.platform.jobs.checkpoint import read_config, trained_method
from kvlab.platform.jobs.context import Context, Stopped
from kvlab.platform.jobs.dtype import torch_dtype
from kvlab.platform.jobs.prepared import applied
from kvlab.platform.serving import export
from kvlab.platform.serving.load import null
from kvlab.platform.serving.load.arrivals import Load
from kvlab.platform.serving.load.client import Asked, Client
from kvlab.platform.serving.server import Listening, Server, started

NAME = "measured"
WARM_UP = 4
"""Requests that are not counted, before the first rate."""
MOST_OVERHEAD = 0.1
"""The client's own part of the time to the first token, as a share of what is measured."""
LATE = 0.05
"""Seconds that a request may leave late, at the 99th percentile."""
LOOK_EVERY = 0.1
PERCENTILES = (50, 90, 99)


def run(spec: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Serve parent "of" under `apply`, and load it at each rate.

    Args:
        spec: see `ServeBenchmarkSettings`.

    Returns:
        rates: of each, rate (asked, requests a second), requests, completed, errors, seconds,
        request_rate, tokens_per_second, time_to_first_token and inter_token (p50, p90, p99,
        seconds), goodput (requests a second that kept the slo), preemptions, peak_usage (of the
        pool), late (99th percentile, seconds); client: the same of a server that does nothing;
        pool; gates (client_fast_enough, complete, alone_before); environment.

    Raises:
        KvlabError: the server does not start.
    """
    device = environment.prepare(context, spec["seed"])
    others = machine.before()
    source = context.inputs["of"]
    span = from_dict(trained_method(source)).span()
    apply = applied(spec, context, -(-spec["prompt"][1] // span))
    load = Load(
        spec["requests"], tuple(spec["prompt"]), tuple(spec["generate"]), spec["turns"],
        spec["shared_prefix"], read_config(source).vocab_size,
    )  # fmt: skip
    client = _calibrated(load, max(spec["rates"]), spec)
    dtype = str(torch_dtype(spec["dtype"], device)).removeprefix("torch.")
    with TemporaryDirectory(prefix="kvlab-served-") as scratch:
        folder = Path(scratch) / "model"
        export.write(source, apply.to_dict(), folder)
        options = {
            "--dtype": dtype,
            "--kv-cache-memory-bytes": spec["memory"],
            "--max-model-len": load.longest,
            "--max-num-seqs": spec["concurrency"],
        }
        shared = load.turns > 1 or load.shared_prefix > 0
        flags = [] if shared else ["--no-enable-prefix-caching"]  # each rate sends the same
        asked = Listening(
            folder,
            NAME,
            options=[*(str(part) for pair in options.items() for part in pair), *flags],
        )
        with started(asked, context.folder / "server.log") as server:
            pool = server.pool()
            warm = Load(WARM_UP, load.prompt, load.generate, 1, 0, load.vocabulary)
            Client(server.url, NAME, server.headers()).run(warm.drawn(100.0, -1))
            rates = [
                _at(rate, number if shared else 0, load, server, spec, context)
                for number, rate in enumerate(spec["rates"])
            ]
    slowest = min(found["time_to_first_token"]["p50"] for found in rates)
    own = client["time_to_first_token"]["p50"]
    return {
        "rates": rates,
        "client": client,
        "pool": pool,
        "gates": {
            "client_fast_enough": own <= MOST_OVERHEAD * slowest
            and all(found["late"] <= LATE for found in rates),
            "complete": not any(found["errors"] for found in rates),
            "alone_before": others is None or others <= machine.MOST_CORES,
        },
        "environment": environment.capture(context, dtype=dtype),
    }


def _calibrated(load: Load, rate: float, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Load a server that does nothing: what is measured is the client."""
    few = Load(
        min(load.requests, 64), load.prompt, load.generate, 1, load.shared_prefix, load.vocabulary
    )
    with null.started() as url:
        found, seconds = Client(url, NAME, {}).run(few.drawn(rate, spec["seed"] or 0))
    return _figures(rate, found, seconds, spec["slo"])


def _at(
    rate: float,
    draw: int,
    load: Load,
    server: Server,
    spec: Mapping[str, Any],
    context: Context,
) -> dict[str, Any]:
    """Load it at one rate. Where prefixes are shared each rate has a `draw` of ids of its own."""
    before, done = _counted(server), 0

    def told(asked: Asked) -> None:
        nonlocal done
        done += 1
        context.progress(done, load.requests, f"{rate:g} requests a second")
        if context.stopping():
            raise Stopped

    client = Client(server.url, NAME, server.headers())
    with _Watch(server) as watch:
        found, seconds = client.run(load.drawn(rate, (spec["seed"] or 0) + 1_000_003 * draw), told)
    after = _counted(server)
    return {
        **_figures(rate, found, seconds, spec["slo"]),
        "preemptions": int(after - before),
        "peak_usage": watch.peak,
    }


def _figures(
    rate: float, found: Sequence[Asked], seconds: float, slo: Mapping[str, float]
) -> dict[str, Any]:
    whole = [asked for asked in found if asked.error is None and asked.chunks]
    gaps = [gap for asked in whole for gap in asked.gaps]
    good = sum(
        asked.first <= slo["first_token"]
        and (not asked.gaps or max(asked.gaps) <= slo["between_tokens"])
        for asked in whole
    )
    return {
        "rate": rate,
        "requests": len(found),
        "completed": len(whole),
        "errors": sorted({asked.error for asked in found if asked.error})[:5],
        "seconds": seconds,
        "request_rate": len(whole) / seconds,
        "tokens_per_second": sum(asked.tokens for asked in whole) / seconds,
        "time_to_first_token": percentiles([asked.first for asked in whole]),
        "inter_token": percentiles(gaps),
        "goodput": good / seconds,
        "late": percentiles([asked.sent - asked.due for asked in found])["p99"],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99: the least value that so many of 100 do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return {
        f"p{share}": ordered[-(-share * len(ordered) // 100) - 1] if ordered else 0.0
        for share in PERCENTILES
    }


def _counted(server: Server) -> float:
    return _metric(server.get("/metrics"), "vllm:num_preemptions_total")


class _Watch:
    """Looks at how full the pool is, from a thread of its own.

    Attributes: peak: the highest share seen.
    """

    def __init__(self, server: Server) -> None:
        self.peak = 0.0
        self._server, self._ended = server, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, HTTPException):
                text = self._server.get("/metrics")
                self.peak = max(self.peak, _metric(text, "vllm:kv_cache_usage_perc"))


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
