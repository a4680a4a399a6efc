"""The twin of the queries' kernel against the steps that it stands for, and when it answers."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels import query
from kvlab.kernels.query import MOST_ROWS, project, rotate


def pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate by complex numbers: pair i is number i and number i + R / 2."""
    half = angles.shape[-1]
    turned = torch.polar(torch.ones_like(angles), angles)
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * turned
    return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("rotated", [8, 4, 0])
@pytest.mark.parametrize("normed", [True, False])
def test_project_is_its_steps(rotated: int, normed: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5).double(), torch.randn(32, 5).double()
    bias, norm = torch.randn(32).double(), torch.randn(8).double() if normed else None
    angles = torch.randn(2, 1, 3, rotated // 2).double()
    cos, sin = angles.cos(), angles.sin()
    turn = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)) if rotated else None
    found = project(x, weight, 8, bias=bias, norm=norm, eps=1e-6, turn=turn)
    expected = F.linear(x, weight, bias).view(2, 3, 4, 8).transpose(1, 2)
    if norm is not None:
        expected = F.rms_norm(expected, (8,), norm, 1e-6)
    torch.testing.assert_close(found, pairs(expected, angles) if rotated else expected)


def test_gradients_pass() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 5).double(), torch.randn(16, 5).double(), torch.randn(8).double()]
    for x in given:
        x.requires_grad_()
    cos, sin = torch.randn(2, 1, 1, 3, 4).double()

    def call(x: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        return project(x, weight, 8, norm=norm, eps=1e-6, turn=(cos, sin))

    assert torch.autograd.gradcheck(call, given)


def test_rotation_of_each_head() -> None:
    cos, sin = torch.randn(2, 2, 3, 4, 6)
    x = torch.randn(2, 3, 4, 8)
    found = rotate(x, cos, sin)
    for head in range(3):
        one = rotate(x[:, head, None], cos[:, head, None], sin[:, head, None])
        assert torch.equal(found[:, head, None], one)


class Answers(ModuleType):
    """Stands where the kernel's module would."""

    def project(self, *given: Any, **named: Any) -> str:
        return "kernel"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors lay on CUDA, with a kernel that says that it was asked."""
    import kvlab.kernels.gpu as folder

    monkeypatch.setattr(query, "fused", lambda x: True)
    monkeypatch.setitem(sys.modules, "kvlab.kernels.gpu.query", Answers("query"))
    monkeypatch.setattr(folder, "query", Answers("query"), raising=False)


@pytest.mark.usefixtures("kernel")
def test_the_kernel_answers_few_rows_without_gradients() -> None:
    x, weight = torch.ones(2, MOST_ROWS // 2, 16), torch.ones(64, 16)

    def asked(x: Tensor = x, weight: Tensor = weight, dim: int = 32) -> bool:
        return isinstance(project(x, weight, dim), str)

    assert asked()
    assert not asked(torch.ones(2, MOST_ROWS // 2 + 1, 16))
    assert not asked(x.double(), weight.double())
    assert not asked(weight=torch.ones(3, 16), dim=3)
    assert not asked(weight=torch.ones(258, 16), dim=258)
    assert not asked(weight=torch.ones(16, 64).T)
    trained = torch.ones(64, 16, requires_grad=True)
    assert not asked(weight=trained)
    with torch.no_grad():
        assert asked(weight=trained)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("lower", [False, True])
def test_autocast_is_left_to_torch(lower: bool) -> None:
    x, weight = torch.ones(2, 1, 16), torch.ones(64, 16)
    with torch.autocast("cpu", torch.bfloat16) if lower else nullcontext():
        found = project(x, weight, 32)
    assert isinstance(found, str) != lower
