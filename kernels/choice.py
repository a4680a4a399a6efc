"""Which of the two answers a call: the Triton kernel, or its twin in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_twins_alone = False


@contextmanager
def torch_only() -> Iterator[None]:
    """Let the twins answer on CUDA too: to compare kernels with them, or to rule kernels out.

    For the whole process, all threads of it.
    """
    global _twins_alone
    before, _twins_alone = _twins_alone, True
    try:
        yield
    finally:
        _twins_alone = before


def fused(x: Tensor) -> bool:
    """Whether a kernel is to answer for this tensor."""
    return x.is_cuda and not _twins_alone
