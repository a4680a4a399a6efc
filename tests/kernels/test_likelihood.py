"""The fused head and cross entropy against `F.cross_entropy`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels import likelihood
from kvlab.kernels.likelihood import linear_nll


def operands(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(600, 8, dtype=dtype, requires_grad=True)
    table = torch.randn(40, 8, dtype=dtype, requires_grad=True)
    return hidden, table, torch.randint(40, (600,))


@pytest.mark.parametrize("kept", [1 << 27, 0], ids=["logits kept", "computed twice"])
def test_value_and_gradients(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_KEPT", kept)
    monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK_CPU", 1)  # three chunks of 256 rows at most
    hidden, table, targets = operands()
    nll = linear_nll(hidden, table, targets)
    expected = F.cross_entropy(F.linear(hidden, table), targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    scale = torch.randn(600, dtype=torch.double)
    for ours, theirs in zip(
        torch.autograd.grad(nll, (hidden, table), scale),
        torch.autograd.grad(expected, (hidden, table), scale),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_low_precision_is_summed_in_float32() -> None:
    hidden, table, targets = operands(torch.bfloat16)
    nll = linear_nll(hidden, table, targets)
    assert nll.dtype == torch.float32
    logits = F.linear(hidden, table).float()
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets, reduction="none"))
    nll.mean().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_follows_autocast() -> None:
    hidden, table, targets = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = linear_nll(hidden, table, targets)
        logits = F.linear(hidden, table)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    nll.mean().backward()
    assert table.grad is not None
    assert table.grad.dtype == torch.float32
    ours = table.grad.clone()
    table.grad = None
    expected.mean().backward()
    torch.testing.assert_close(ours, table.grad, rtol=0.05, atol=1e-3)


def test_a_frozen_table_gets_no_gradient() -> None:
    hidden, table, targets = operands()
    table.requires_grad_(False)
    linear_nll(hidden, table, targets).sum().backward()
    assert table.grad is None
    assert hidden.grad is not None


def test_runs_without_gradients() -> None:
    hidden, table, targets = operands()
    with torch.inference_mode():
        nll = linear_nll(hidden, table, targets)
    torch.testing.assert_close(nll, linear_nll(hidden, table, targets).detach())
