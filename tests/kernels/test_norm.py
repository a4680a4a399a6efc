"""RMSNorm against the formula, in values and in gradients."""

from __future__ import annotations

import pytest
import torch

from kvlab.kernels.norm import rms_norm


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 8), (2, 3, 4, 16)])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_value_and_gradients(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * scale).requires_grad_()
    weight = torch.randn(shape[-1], requires_grad=True)
    out = rms_norm(x, weight, 1e-5)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(out, exact.float())
    g = torch.randn(shape)
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, weight), g),
        torch.autograd.grad(exact, (x, weight), g.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), out)


def test_the_dtype_of_x_is_kept() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    low = rms_norm(x.bfloat16(), weight, 1e-5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), rms_norm(x, weight, 1e-5), rtol=0.02, atol=0.02)


def test_a_frozen_weight() -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
