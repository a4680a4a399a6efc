"""Queries projected, normed and rotated on a GPU against plain maths in float64, and the twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvlab.kernels import query as twin

CASES = [
    # batch, tokens, width, heads, dim, rotated
    (1, 1, 64, 1, 32, 32),
    (3, 1, 100, 4, 64, 64),
    (2, 9, 257, 2, 96, 24),
    (5, 4, 40, 8, 80, 80),
    (1, 33, 300, 2, 128, 64),
    (70, 1, 48, 1, 256, 256),
    (2, 3, 33, 3, 34, 0),
    (1, 2, 16, 1, 32, -1),
]
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
EPS = 1e-5


def made(case: tuple[int, ...], dtype: torch.dtype, *, full: bool, each: bool) -> dict[str, Any]:
    """Arguments of `project`; `full`: with bias and norm; `each`: positions of each sample."""
    batch, tokens, width, heads, dim, rotated = case
    given: dict[str, Any] = {
        "x": torch.randn(batch, tokens, width).to(dtype),
        "weight": (torch.randn(heads * dim, width) * width**-0.5).to(dtype),
        "head_dim": dim,
        "bias": torch.randn(heads * dim).to(dtype) if full else None,
        "norm": torch.randn(dim).to(dtype) if full else None,
        "eps": EPS,
        "turn": None,
    }
    if rotated >= 0:
        angles = 100 * torch.rand(batch if each else 1, 1, tokens, rotated // 2)
        cos, sin = angles.cos(), angles.sin()
        given["turn"] = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
    return given


def moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(move(part) for part in x)
        return x.to(device) if isinstance(x, Tensor) else x

    return {name: move(x) for name, x in given.items()}


def exact(given: dict[str, Any]) -> Tensor:
    """In float64, pair by pair."""
    x, weight = given["x"].double(), given["weight"].double()
    rows = x @ weight.T
    if given["bias"] is not None:
        rows = rows + given["bias"].double()
    q = torch.unflatten(rows, -1, (-1, given["head_dim"])).transpose(1, 2)
    if given["norm"] is not None:
        q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt() * given["norm"].double()
    if given["turn"] is None:
        return q
    cos, sin = (part.double() for part in given["turn"])
    half, out = cos.shape[-1] // 2, q.clone()
    for i in range(half):
        out[..., i] = q[..., i] * cos[..., i] - q[..., i + half] * sin[..., i + half]
        out[..., i + half] = q[..., i + half] * cos[..., i] + q[..., i] * sin[..., i + half]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("seed")
def test_queries(
    device: torch.device, case: tuple[int, ...], dtype: torch.dtype, full: bool
) -> None:
    from kvlab.kernels.gpu import query as gpu

    given = made(case, dtype, full=full, each=case[0] > 2)
    expected = exact(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        found = gpu.project(**moved(given, device))
    assert found.dtype == dtype
    error = ERRORS[dtype] * float(expected.abs().max().clamp_min(1))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=error)
    torch.testing.assert_close(twin.project(**given).double(), expected, rtol=0, atol=4 * error)


def poisoned(size: tuple[int, ...], **how: Any) -> Tensor:
    return torch.full(size, float("nan"), **how)


@pytest.mark.usefixtures("seed")
def test_rows_of_larger_storages(device: torch.device) -> None:
    """The last row of a prompt, the queries' part of a map, numbers of mixed dtypes."""
    from kvlab.kernels.gpu import query as gpu

    given = moved(made((2, 1, 64, 2, 32, 32), torch.float16, full=True, each=True), device)
    wanted = gpu.project(**given)
    x = torch.full((2, 7, 64), float("nan"), dtype=torch.float16, device=device)
    x[:, -1:] = given["x"]
    weight = torch.full((192, 80), float("nan"), dtype=torch.float16, device=device)
    weight[:64, :64] = given["weight"]
    turn = tuple(part.expand(2, 1, 5, 32).float()[:, :, 2:3] for part in given["turn"])
    others = {"bias": given["bias"].float(), "norm": given["norm"].float(), "turn": turn}
    found = gpu.project(x[:, -1:], weight[:64, :64], 32, eps=EPS, **others)
    torch.testing.assert_close(found, wanted)


def test_no_row_at_all(device: torch.device) -> None:
    from kvlab.kernels.gpu import query as gpu

    x, weight = torch.ones(2, 0, 16, device=device), torch.ones(64, 16, device=device)
    assert gpu.project(x, weight, 32).shape == (2, 2, 0, 32)
    assert gpu.project(x.new_ones(0, 1, 16), weight, 32).shape == (0, 2, 1, 32)


X, WEIGHT, COS = torch.ones(3, 2, 16), torch.ones(64, 16), torch.ones(3, 1, 2, 8)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("x", {"x": X[0]}),
        ("weight", {"weight": WEIGHT[:, :8]}),
        ("weight", {"weight": WEIGHT[:40]}),
        ("weight", {"head_dim": 0}),
        ("weight", {"weight": WEIGHT.to("meta")}),
        ("bias", {"bias": torch.ones(32)}),
        ("bias", {"bias": torch.ones(64, device="meta")}),
        ("norm", {"norm": torch.ones(64)}),
        ("turn", {"turn": (COS[:2], COS[:2])}),
        ("turn", {"turn": (COS[:, :, :1], COS[:, :, :1])}),
        ("turn", {"turn": (COS[..., :7], COS[..., :7])}),
        ("turn", {"turn": (COS.repeat(1, 1, 1, 5),) * 2}),
        ("turn's sines", {"turn": (COS, COS[:1])}),
        ("turn's sines", {"turn": (COS, COS.to("meta"))}),
    ],
)
def test_what_does_not_go_together_is_refused(
    device: torch.device, name: str, changed: dict[str, Any]
) -> None:
    from kvlab.kernels.gpu import query as gpu

    given = {"x": X, "weight": WEIGHT, "head_dim": 32} | changed
    for function in (gpu.project, twin.project):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(**given)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("x", {"x": X.double()}),
        ("weight", {"weight": WEIGHT.half()}),
        ("norm", {"norm": torch.ones(32).double()}),
        ("head_dim", {"head_dim": 1}),
        ("head_dim", {"weight": torch.ones(258, 16), "head_dim": 258}),
        ("x", {"x": X.mT.contiguous().mT}),
        ("weight", {"weight": WEIGHT.T.contiguous().T}),
    ],
)
def test_what_torch_alone_takes_is_refused(
    device: torch.device, name: str, changed: dict[str, Any]
) -> None:
    from kvlab.kernels.gpu import query as gpu

    with pytest.raises(ValueError, match=f"^{name}: "):
        gpu.project(**({"x": X, "weight": WEIGHT, "head_dim": 32} | changed))
