"""The cosine of residual streams on a GPU against torch's own in float64, and against the twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.kernels import similarity

SHAPES = [(1, 1, 1), (2, 5, 7), (3, 2, 300), (1, 3, 2049), (2, 1, 4096), (5, 40, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def streams(device: torch.device, *shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    before = torch.randn(shape)
    delta = 0.3 * torch.randn(shape)
    return before.to(device, dtype), delta.to(device, dtype)


def truncating(device: torch.device, dtype: torch.dtype) -> float:
    """How far off a rounded sum may be: the interpreter cuts bfloat16 off instead of rounding."""
    return 2**-7 if device.type == "cpu" and dtype == torch.bfloat16 else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("seed")
def test_the_cosine(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from kvlab.kernels.gpu.cosine import residual_cosine

    before, delta = streams(device, *shape, dtype=dtype)
    after = before + delta
    found = residual_cosine(before, after)
    assert found.dtype == torch.float32
    exact = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-8)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("seed")
def test_the_sum_and_the_means(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from kvlab.kernels.gpu.cosine import add_with_cosine

    before, delta = streams(device, *shape, dtype=dtype)
    valid = torch.rand(shape[:2], device=device) < 0.6
    valid[0] = False
    for counted in (None, valid):
        found = add_with_cosine(before, delta, counted)
        twin = similarity.add_with_cosine(before.cpu(), delta.cpu(), _cpu(counted))
        rounding = truncating(device, dtype)
        torch.testing.assert_close(found.after.cpu(), twin.after, rtol=rounding, atol=0)
        exact = F.cosine_similarity(before.double(), found.after.double(), dim=-1, eps=1e-8)
        torch.testing.assert_close(found.cosine.double(), exact, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.mean.cpu(), twin.mean, rtol=0, atol=1e-6 + rounding)
    assert found.mean[0] == 0


@pytest.mark.usefixtures("seed")
def test_streams_of_two_dtypes_and_of_any_strides(device: torch.device) -> None:
    from kvlab.kernels.gpu.cosine import add_with_cosine, residual_cosine

    before, delta = streams(device, 2, 6, 50, dtype=torch.float32)
    apart = torch.stack((before, delta), dim=-1)
    sliced = torch.cat((before, before), dim=1)[:, 3:9]
    for x, y in (
        (before, delta.bfloat16()),
        (before.bfloat16(), delta.half()),
        apart.unbind(-1),
        (sliced, delta.transpose(0, 1).contiguous().transpose(0, 1)),
        (before[:1].expand(2, -1, -1), delta),
    ):
        found, twin = add_with_cosine(x, y), similarity.add_with_cosine(x.cpu(), y.cpu())
        assert torch.equal(found.after.cpu(), twin.after)
        torch.testing.assert_close(found.cosine.cpu(), twin.cosine, rtol=0, atol=1e-6)
        found = residual_cosine(x, y)
        expected = F.cosine_similarity(x.double(), y.double(), dim=-1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_every_number_of_the_answer_is_written(device: torch.device) -> None:
    from kvlab.kernels.gpu import cosine

    def poisoned(size: tuple[int, ...], **how: Any) -> Tensor:
        return torch.full(size, float("nan"), **how)

    before, delta = streams(device, 3, 7, 65, dtype=torch.float32)
    valid = torch.ones(3, 7, dtype=torch.bool, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine.torch, "empty", poisoned)
        found = cosine.add_with_cosine(before, delta, valid)
    assert not any(part.isnan().any() for part in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_nothing_and_tiny_rows(device: torch.device, dtype: torch.dtype) -> None:
    from kvlab.kernels.gpu.cosine import residual_cosine

    rows = (torch.zeros(8), torch.full((8,), 1e-9), torch.ones(8))
    before = torch.stack(rows)[None].to(device, dtype)
    after = torch.stack((rows[2], rows[1], -rows[2]))[None].to(device, dtype)
    exact = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-8)
    found = residual_cosine(before, after)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_streams_without_rows(device: torch.device, shape: tuple[int, ...]) -> None:
    from kvlab.kernels.gpu.cosine import add_with_cosine, residual_cosine

    x = torch.ones(shape, device=device)
    found = add_with_cosine(x, x)
    assert (found.after.shape, found.cosine.shape) == (shape, shape[:2])
    assert found.mean.tolist() == [0.0] * shape[0]
    assert residual_cosine(x, x).shape == shape[:2]


@pytest.mark.parametrize(
    ("name", "before", "delta", "valid"),
    [
        ("before", torch.ones(3, 4), torch.ones(3, 4), None),
        ("before", torch.ones(2, 3, 4).long(), torch.ones(2, 3, 4), None),
        ("delta", torch.ones(2, 3, 4), torch.ones(2, 3, 5), None),
        ("delta", torch.ones(2, 3, 4), torch.ones(2, 3, 4).long(), None),
        ("delta", torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta"), None),
        ("valid", torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 3)),
        ("valid", torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 4).bool()),
    ],
)
def test_what_does_not_go_together_is_refused(
    device: torch.device, name: str, before: Tensor, delta: Tensor, valid: Tensor | None
) -> None:
    from kvlab.kernels.gpu.cosine import add_with_cosine

    for function in (add_with_cosine, similarity.add_with_cosine):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(before, delta, valid)


def _cpu(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cpu()
