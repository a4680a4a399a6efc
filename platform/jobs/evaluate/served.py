"""Answers through vLLM's engine: what a server says, judged as what kvlab's own engine says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kvlab.methods.axis import Method
from kvlab.platform.jobs.evaluate.recall import Answering
from kvlab.platform.serving.opened import opened


@contextmanager
def answering(
    source: Path, apply: Method, dtype: torch.dtype, longest: int, batch: int, seed: int | None
) -> Iterator[Answering]:
    """Start an engine over a model's folder, with room for a batch of the longest requests."""
    with opened(source, apply, dtype, longest=longest, requests=batch, seed=seed or 0) as found:

        def answer(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
            return [list(one.ids) for one in found.engine.generate(prompts, tokens)]

        yield answer
