"""Workflows to break."""

from __future__ import annotations

from collections.abc import Callable

import pytest

HEAD = """\
version: 1
name: small
model: {preset: nano}
data: {source: python, tokenizer: {bpe: 512}, sequence_length: 64}
jobs:
"""


GOOD = """\
version: 1
name: quickstart
seeds: [0, 1, 2]
model: {preset: nano}
data: {source: python, tokenizer: {bpe: 2048}, sequence_length: 256}
jobs:
  base:
    train: {method: full_attention, tokens: 400k}
  block:
    matrix: {uptrain.method.block_transformer.block_length: [2, 4]}
    uptrain: {from: base, method: {block_transformer: {block_length: 2}}, tokens: 100k}
  quality:
    evaluate: {of: [base, block], metrics: [perplexity, loss_by_position]}
  speed:
    benchmark: {of: [base, block], prompt: 128, generate: 128, batch: [1, 8, 32], repeats: 5}
report: {baseline: base, pareto: [perplexity, tokens_per_second, kv_bytes_per_token]}
"""


@pytest.fixture
def good() -> str:
    """A workflow without a mistake; tests name its lines."""
    return GOOD


@pytest.fixture
def jobs() -> Callable[[str], str]:
    """Return a workflow (5 lines of head) with these jobs, each line indented by two already."""
    return lambda text: HEAD + text
