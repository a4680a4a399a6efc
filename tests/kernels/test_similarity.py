"""The cosine of residual streams against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels import similarity
from kvlab.kernels.similarity import residual_cosine


def streams(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    before = torch.randn(shape)
    return before.to(dtype), (before + 0.1 * torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 33, 48), (1, 300, 1024), (1, 0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before, after = streams(*shape, dtype=dtype)
    found = residual_cosine(before, after)
    assert found.dtype == torch.float32
    exact = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-8)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("held", [1, 7, 50, 100])
def test_how_much_is_held_changes_nothing(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    before, after = streams(2, 9, 10)
    whole = residual_cosine(before, after)
    monkeypatch.setattr(similarity, "ALONE", held)
    monkeypatch.setattr(similarity, "FEW_THREADS", torch.get_num_threads())
    torch.testing.assert_close(residual_cosine(before, after), whole, rtol=0, atol=1e-7)


def test_many_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = streams(2, 90, 1024)
    few = residual_cosine(before, after)
    monkeypatch.setattr(similarity, "FEW_THREADS", 0)
    torch.testing.assert_close(residual_cosine(before, after), few, rtol=0, atol=1e-7)


def test_rows_of_nothing_and_tiny_rows() -> None:
    before = torch.stack((torch.zeros(8), torch.full((8,), 1e-9), torch.ones(8)))[None]
    after = torch.stack((torch.ones(8), torch.full((8,), 1e-9), -torch.ones(8)))[None]
    expected = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-8)
    torch.testing.assert_close(residual_cosine(before, after).double(), expected, atol=1e-6, rtol=0)


def test_views_gradients_and_autocast() -> None:
    before, after = streams(2, 6, 16)
    expected = residual_cosine(before, after)
    apart = torch.stack((before, after), dim=-1)
    torch.testing.assert_close(residual_cosine(*apart.unbind(-1)), expected)
    tracked = residual_cosine(before.clone().requires_grad_(), after)
    assert not tracked.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(residual_cosine(before, after), expected, rtol=0, atol=1e-7)
