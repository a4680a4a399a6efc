"""The best of many rows, on a GPU against its twin: to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvlab.kernels import select as twin
from kvlab.kernels.attention import EMPTY

INF = float("inf")


def same(device: torch.device, scores: Tensor, most: int, **how: object) -> Tensor:
    from kvlab.kernels.gpu.select import best

    moved = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in how.items()}
    found = best(scores.to(device), most, **moved)  # type: ignore[arg-type]
    assert torch.equal(found.cpu(), twin.best(scores, most, **how))  # type: ignore[arg-type]
    return found.cpu()


@pytest.mark.parametrize(("count", "most"), [(1, 1), (5, 3), (64, 63), (150, 20), (40, 70)])
@pytest.mark.usefixtures("seed")
def test_the_best(device: torch.device, count: int, most: int) -> None:
    same(device, torch.randn(2, count), most)
    ties = torch.randint(-3, 3, (2, 2, count)).float() / 2
    same(device, ties, most)
    same(device, ties, most, above=0.0)
    same(device, ties, most, budgets=torch.randint(-1, most + 2, (2, 2)))
    same(device, ties.masked_fill(torch.rand(ties.shape) < 0.5, -INF).transpose(0, 1), most)


@pytest.mark.usefixtures("seed")
def test_the_best_in_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlab.kernels.gpu import select

    monkeypatch.setattr(select, "TILE", 16)
    for most in (1, 40, 90):
        same(device, torch.randint(4, (2, 83)).float(), most)
        same(device, torch.randn(2, 83), most, above=0.3)


def test_extremes_and_zeros_of_both_signs(device: torch.device) -> None:
    nan, tiny = float("nan"), 1e-45
    row = torch.tensor([[0.0, -0.0, tiny, -tiny, INF, -INF, 3e38, -3e38, nan, -0.0, 0.0]])
    for most in range(1, 12):
        found = same(device, row, most)
        assert 8 not in found
        assert 5 not in found
    assert same(device, row, 3, above=0.0).tolist() == [[2, 4, 6]]
    assert same(device, torch.full((1, 4), -INF), 2).tolist() == [[EMPTY, EMPTY]]
    assert same(device, torch.empty(2, 0), 2).tolist() == [[EMPTY, EMPTY]] * 2
    assert same(device, torch.empty(0, 3), 2).shape == (0, 2)


def test_the_best_are_those_of_torch(device: torch.device, seed: int) -> None:
    scores = torch.rand(4, 500)
    found = same(device, scores, 37)
    assert torch.equal(found, scores.topk(37).indices.sort(-1).values)


SCORES = torch.zeros(2, 5)
NUMBERS = torch.zeros(2, 3, dtype=torch.long)


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    from kvlab.kernels.gpu import select

    for module in (select, twin):
        for name, given in (
            ("scores", (SCORES.double(), 2)),
            ("scores", (torch.tensor(1.0), 2)),
            ("most", (SCORES, 0)),
        ):
            with pytest.raises(ValueError, match=f"^{name}: "):
                module.best(*given)
        for budgets in (NUMBERS, NUMBERS[:, 0].float(), NUMBERS[:, 0].to("meta")):
            with pytest.raises(ValueError, match=r"^budgets: "):
                module.best(SCORES, 2, budgets=budgets)
