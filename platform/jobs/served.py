"""What a job that serves refuses before it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator

from kvlab.methods.axis import Method
from kvlab.platform.jobs.kind import Parent
from kvlab.platform.jobs.method import canonical
from kvlab.platform.jobs.model import lineage
from kvlab.platform.serving.demand import problems, under

SERVER_SOURCES = (
    "kvlab.methods.block_transformer.serving",
    "kvlab.methods.budget.cost",
    "kvlab.methods.cache",
    "kvlab.platform.jobs.checkpoint",
    "kvlab.platform.jobs.controller.supply",
    "kvlab.platform.serving",
)
"""Packages and modules that decide what a server's engine does, whatever it serves."""


def distribution() -> str:
    """The name under which vLLM is installed; its usual one where it is not."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        return "vllm"
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    return names[0]


def unserved(apply: Method, parent: Parent) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) where a server cannot keep a model under run-time choices."""
    config, trained = lineage(parent)
    for problem in problems(config, under(trained, canonical(apply))):
        yield "apply", problem
