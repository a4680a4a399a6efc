"""Every number a comparison knows: what it is called, its unit, which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher"]
Place = Literal[
    "quality", "divergence", "recall", "multi_turn", "speed", "serving", "load", "training"
]
"""Where a number comes from: a part of an evaluation, a benchmark (by kvlab's engine, by vLLM's, of
its server under load), or what made the model."""
QUALITIES = frozenset({"quality", "divergence", "recall", "multi_turn"})
"""Places of an evaluation: held-out text, the full cache's answers to it, and questions."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One kind of number.

    Attributes:
        key: its name in results, JSON and `report.pareto`. title: its name in a table.
        exact: counted, not measured: equal settings give equal values, so no interval is needed.
        timed: a clock was involved, so gates about timing void it.
        absolute: it is compared by differences, not by ratios: it may be zero.
    """

    key: str
    title: str
    unit: str
    better: Direction
    place: Place
    exact: bool = False
    timed: bool = False
    absolute: bool = False

    @property
    def quality(self) -> bool:
        """Whether it says how good the model's answers are, not what they cost."""
        return self.place in QUALITIES


RATES = {"tokens_per_second": "tokens/s", "decode_tokens_per_second": "decode tokens/s"}
AT_BUDGET = "_at_budget"
"""Ending of a rate at the largest batch whose cache fits `kv_budget`: each arm has its own."""

METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("perplexity", "perplexity", "", "lower", "quality"),
        Metric("perplexity_per_byte", "perplexity per byte", "", "lower", "quality"),
        Metric("bits_per_byte", "bits per byte", "bit", "lower", "quality"),
        Metric("loss", "loss", "nat", "lower", "quality"),
        Metric("kl", "KL", "nat", "lower", "divergence", absolute=True),
        Metric("top1_agreement", "top-1 agreement", "%", "higher", "divergence", absolute=True),
        Metric("identical_tokens", "identical tokens", "", "higher", "divergence", absolute=True),
        Metric("continuation_perplexity", "continuation perplexity", "", "lower", "divergence"),
        Metric("recall", "recall", "%", "higher", "recall", absolute=True),
        Metric("recall_after_cut", "recall after cut", "%", "higher", "multi_turn", absolute=True),
        Metric("tokens_per_second", "tokens/s", "tok/s", "higher", "speed", timed=True),
        Metric(
            "decode_tokens_per_second", "decode tokens/s", "tok/s", "higher", "speed", timed=True
        ),
        Metric("prefill_seconds", "prefill", "s", "lower", "speed", timed=True),
        Metric("time_to_first_token", "first token", "s", "lower", "speed", timed=True),
        Metric("kv_bytes_per_token", "KV per token", "B", "lower", "speed", exact=True),
        Metric("kv_bytes_per_token_predicted", "KV predicted", "B", "lower", "speed", exact=True),
        Metric("peak_memory_bytes", "peak memory", "B", "lower", "speed"),
        Metric("largest_batch", "largest batch", "", "higher", "speed", exact=True),
        *(
            Metric(rate + AT_BUDGET, f"{title} at budget", "tok/s", "higher", "speed", timed=True)
            for rate, title in RATES.items()
        ),
        Metric(
            "served_tokens_per_second", "vLLM tokens/s", "tok/s", "higher", "serving", timed=True
        ),
        Metric(
            "served_time_to_first_token", "vLLM first token", "s", "lower", "serving", timed=True
        ),
        Metric(
            "served_kv_bytes_per_token", "vLLM KV per token", "B", "lower", "serving", exact=True
        ),
        Metric(
            "served_preemptions",
            "vLLM preemptions",
            "",
            "lower",
            "serving",
            exact=True,
            absolute=True,
        ),
        Metric("pool_requests", "requests in the pool", "", "higher", "serving", exact=True),
        Metric("vllm_requests", "vLLM max concurrency", "", "higher", "serving", exact=True),
        Metric(
            "load_tokens_per_second", "tokens/s under load", "tok/s", "higher", "load", timed=True
        ),
        Metric("load_goodput", "goodput", "/s", "higher", "load", timed=True, absolute=True),
        Metric("load_first_token_p50", "first token p50", "s", "lower", "load", timed=True),
        Metric("load_first_token_p99", "first token p99", "s", "lower", "load", timed=True),
        Metric("load_inter_token_p50", "inter-token p50", "s", "lower", "load", timed=True),
        Metric("load_inter_token_p99", "inter-token p99", "s", "lower", "load", timed=True),
        Metric("load_peak_usage", "pool in use", "%", "lower", "load", absolute=True),
        Metric("load_preemptions", "preemptions", "", "lower", "load", exact=True, absolute=True),
        Metric("body_parameters", "body parameters", "", "lower", "training", exact=True),
        Metric("parameters", "parameters", "", "lower", "training", exact=True),
        Metric("train_seconds", "training", "s", "lower", "training", timed=True),
        Metric("train_flops", "training FLOPs", "FLOP", "lower", "training", exact=True),
    )
}
"""Names that `report.pareto` may use, in the order in which tables show them."""


def metric_of(name: str, goal: str | None = None) -> Metric:
    """Return a metric; of KIND.KEY, a number that a job's result holds, a plain one.

    Args: goal: "minimize" or "maximize", where a study says so.
    """
    known = METRICS.get(name)
    if known is not None:
        return known
    better: Direction = "higher" if goal == "maximize" else "lower"
    return Metric(name, name, "", better, "speed", absolute=True)


TIMING_GATES = frozenset({"repeats_enough", "alone", "alone_before", "client_fast_enough"})
"""Benchmark gates that speak of the clock alone: counted bytes stand when one of them is closed."""

GATES: dict[str, str] = {
    "repeats_enough": "too few repeats for an interval",
    "alone": "the machine was not idle",
    "alone_before": "the machine was not idle",
    "client_fast_enough": "the client was too slow for what it measured",
    "complete": "some requests failed",
    "tokens_as_asked": "it did not generate or keep as many tokens as asked",
}
"""What a closed gate means; one that is not listed is shown by its own name."""


def gate_reason(name: str) -> str:
    """Say in words why a closed gate voids a number."""
    return GATES.get(name, f"gate '{name}' is closed")
